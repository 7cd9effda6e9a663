# CUTLASS_INCLUDE: the headers with the instruction wrappers, from $CUTLASS_PATH (the folder of `include`) or the package nvidia-cutlass.
if(DEFINED ENV{CUTLASS_PATH})
  set(CUTLASS_INCLUDE $ENV{CUTLASS_PATH}/include)
else()
  include(${CMAKE_CURRENT_LIST_DIR}/find_python_package.cmake)
  find_python_package(cutlass_library CUTLASS_INCLUDE)
  string(APPEND CUTLASS_INCLUDE /source/include)
endif()
if(NOT EXISTS "${CUTLASS_INCLUDE}/cute/config.hpp")
  message(FATAL_ERROR "the Hopper kernels need CUTLASS 4.2 headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH, "
                      "or build for CPUs only with JETKERNELS_BUILD=cpu")
endif()
