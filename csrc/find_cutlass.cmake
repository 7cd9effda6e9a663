# CUTLASS_INCLUDE: the headers with the instruction wrappers, from $CUTLASS_PATH (the folder of `include`) or the package nvidia-cutlass.
if(DEFINED ENV{CUTLASS_PATH})
  set(CUTLASS_INCLUDE $ENV{CUTLASS_PATH}/include)
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(next(iter(u.find_spec('cutlass_library').submodule_search_locations)) + '/source/include', end='')"
    OUTPUT_VARIABLE CUTLASS_INCLUDE ERROR_QUIET)
endif()
if(NOT EXISTS "${CUTLASS_INCLUDE}/cute/config.hpp")
  message(FATAL_ERROR "the Hopper kernels need CUTLASS 4.2 headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH, "
                      "or build for CPUs only with JETKERNELS_BUILD=cpu")
endif()
