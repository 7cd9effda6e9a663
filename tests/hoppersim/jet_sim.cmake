# torch.ops.jet_sim.*: the library's own bindings and CUDA sources, compiled against the simulated runtime. Nothing is
# written for the simulator but the macro JET_SIMULATED_DEVICE (bindings/registration.h).
get_filename_component(JET_ROOT ${CMAKE_CURRENT_SOURCE_DIR}/../.. ABSOLUTE)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import torch, pathlib; p = pathlib.Path(torch.__file__).parent; print(f'{p}/include;{p}/lib', end='')"
  OUTPUT_VARIABLE torch_facts RESULT_VARIABLE torch_missing ERROR_QUIET)
if(torch_missing)
  message(STATUS "hoppersim: no torch, so no jet_sim")
  return()
endif()
list(GET torch_facts 0 TORCH_INCLUDE)
list(GET torch_facts 1 TORCH_LIB)

set(CMAKE_CXX_STANDARD 20)  # as the product
file(GLOB_RECURSE JET_CUDA_SOURCES CONFIGURE_DEPENDS ${JET_ROOT}/csrc/*.cu)
include(${JET_ROOT}/cmake/find_cutlass.cmake)
set(JET_CUDA_FLAGS -std=c++20 -O3 -gencode arch=compute_90a,code=compute_90a --no-compress -cudart none
                   -Xcompiler=-fPIC,-fvisibility=hidden --expt-relaxed-constexpr -I${JET_ROOT} -isystem ${CUTLASS_INCLUDE})
foreach(source IN LISTS JET_CUDA_SOURCES)
  file(RELATIVE_PATH stem ${JET_ROOT} ${source})
  string(REPLACE "/" "." stem ${stem})
  set(object ${CMAKE_BINARY_DIR}/jet_sim/${stem}.o)
  add_custom_command(OUTPUT ${object} COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/jet_sim
                     COMMAND ${NVCC} ${JET_CUDA_FLAGS} -MD -MF ${object}.d -c ${source} -o ${object}
                     DEPENDS ${source} DEPFILE ${object}.d VERBATIM)
  list(APPEND JET_CUDA_OBJECTS ${object})
endforeach()

# The CPU kernels are only linked, never called: every tensor takes the launch path. So they are not optimised.
file(GLOB_RECURSE JET_CPU_SOURCES CONFIGURE_DEPENDS ${JET_ROOT}/csrc/*_cpu.cpp)
add_library(jet_cpu OBJECT EXCLUDE_FROM_ALL ${JET_CPU_SOURCES})
target_include_directories(jet_cpu PRIVATE ${JET_ROOT})
target_compile_definitions(jet_cpu PRIVATE JET_CPU_ISA=generic JET_CPU_GENERIC_ONLY=1)
target_compile_options(jet_cpu PRIVATE -O0 -Wno-psabi)

file(GLOB JET_BINDING_SOURCES CONFIGURE_DEPENDS ${JET_ROOT}/bindings/*.cpp)
list(FILTER JET_BINDING_SOURCES EXCLUDE REGEX "introspection\\.cpp$")
add_library(jet_sim SHARED EXCLUDE_FROM_ALL ${JET_BINDING_SOURCES} ${JET_ROOT}/csrc/cpu/isa.cpp
            $<TARGET_OBJECTS:jet_cpu> ${JET_CUDA_OBJECTS})
set_target_properties(jet_sim PROPERTIES CXX_VISIBILITY_PRESET hidden BUILD_RPATH "$ORIGIN")
target_include_directories(jet_sim PRIVATE ${JET_ROOT})
target_include_directories(jet_sim SYSTEM PRIVATE ${TORCH_INCLUDE})
target_compile_definitions(jet_sim PRIVATE TORCH_TARGET_VERSION=0x020b000000000000 JET_NAMESPACE=jet_sim
                           JET_SIMULATED_DEVICE=1 JET_WITH_CUDA=1)
target_compile_options(jet_sim PRIVATE -O1)
target_link_libraries(jet_sim PRIVATE hoppersim ${TORCH_LIB}/libtorch_cpu.so)
# The product's library in the same process exports a function of the same name; this one must use its own.
target_link_options(jet_sim PRIVATE -Wl,-Bsymbolic)

# Bounds for CPU tensors: every tensor that torch allocates is a range kernels may touch.
add_library(hoppersim_torch SHARED EXCLUDE_FROM_ALL src/torch/allocator.cpp)
set_target_properties(hoppersim_torch PROPERTIES BUILD_RPATH "$ORIGIN")
target_include_directories(hoppersim_torch SYSTEM PRIVATE ${TORCH_INCLUDE})
target_link_libraries(hoppersim_torch PRIVATE hoppersim ${TORCH_LIB}/libc10.so)
