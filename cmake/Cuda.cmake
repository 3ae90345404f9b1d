# The CUDA half (csrc/*/cuda). TORCHOPS_CUDA is AUTO, ON or OFF; AUTO builds it where torch is a
# CUDA build and nvcc is found, and says which of the two is missing where only one is there.
# Architectures come from TORCH_CUDA_ARCH_LIST. Of the toolkit, nvcc and cudart are enough.

set(TORCHOPS_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(torch_has_cuda FALSE)
if(EXISTS "${TORCHOPS_TORCH_DIR}/lib/libc10_cuda.so")
  set(torch_has_cuda TRUE)
endif()
find_program(TORCHOPS_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin)

set(build_cuda ${TORCHOPS_CUDA})
if(TORCHOPS_CUDA STREQUAL "AUTO")
  set(build_cuda OFF)
  if(torch_has_cuda AND TORCHOPS_NVCC)
    set(build_cuda ON)
  elseif(torch_has_cuda)
    message(WARNING "torchops: torch is a CUDA build, but nvcc was not found: building for the CPU only.")
  endif()
elseif(TORCHOPS_CUDA AND NOT torch_has_cuda)
  message(FATAL_ERROR "torchops: CUDA was asked for (FORCE_CUDA=1), but torch in ${TORCHOPS_TORCH_DIR} is a CPU build: "
                      "install a CUDA build of torch.")
elseif(TORCHOPS_CUDA AND NOT TORCHOPS_NVCC)
  message(FATAL_ERROR "torchops: CUDA was asked for (FORCE_CUDA=1), but nvcc was not found: install the CUDA toolkit, "
                      "or set CUDA_HOME to where it is.")
endif()

set(TORCHOPS_CUDA_VERSION "")
if(build_cuda)
  set(arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT arch_list)
    set(arch_list "8.0;9.0+PTX")
  endif()
  # "8.0;9.0+PTX" -> 80-real;90-real;90-virtual
  set(CMAKE_CUDA_ARCHITECTURES "")
  string(REGEX REPLACE "[ ;,]+" ";" arch_list "${arch_list}")
  foreach(arch IN LISTS arch_list)
    string(REGEX REPLACE "\\.|\\+PTX" "" number "${arch}")
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
    if(arch MATCHES "PTX")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-virtual)
    endif()
  endforeach()
  set(CMAKE_CUDA_COMPILER "${TORCHOPS_NVCC}")
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake before 3.25.2 does not know that nvcc has C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)
  set(TORCHOPS_CUDA_VERSION "${CUDAToolkit_VERSION}")
  message(STATUS "CUDA ${TORCHOPS_CUDA_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()

# Adds the CUDA half to a target; nothing where CUDA is not built.
function(torchops_add_cuda_sources target)
  if(NOT TORCHOPS_CUDA_VERSION)
    return()
  endif()
  target_sources(${target} PRIVATE ${ARGN})
  target_link_libraries(${target} PRIVATE "${TORCHOPS_TORCH_DIR}/lib/libc10_cuda.so" CUDA::cudart)
  # Registers and spills of each kernel go into the build's output.
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xptxas=-v>)
  if(TORCHOPS_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endfunction()
