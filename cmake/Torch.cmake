# Defines the target torchops_torch (torch's headers and libraries) and torchops_openmp (the OpenMP
# runtime that torch itself uses), straight from the files of a torch package or LibTorch folder.
# torch's own CMake package is not used: for a CUDA build of torch it demands parts of the CUDA
# toolkit that torchops does not need.

set(TORCHOPS_TORCH_MINIMUM 2.11)

if(NOT TORCHOPS_TORCH_DIR)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT torch_dir)
    message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: run 'pip install torch', or pass "
                        "-DTORCHOPS_TORCH_DIR=<folder of the torch package or of LibTorch>.")
  endif()
  set(TORCHOPS_TORCH_DIR "${torch_dir}" CACHE PATH "Folder of the torch package or of LibTorch")
endif()

set(version_header "${TORCHOPS_TORCH_DIR}/include/torch/headeronly/version.h")
if(NOT EXISTS "${version_header}")
  message(FATAL_ERROR "${TORCHOPS_TORCH_DIR} holds no torch >= ${TORCHOPS_TORCH_MINIMUM} (no ${version_header}): "
                      "run 'pip install --upgrade torch'.")
endif()
file(STRINGS "${version_header}" version_lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" version_numbers "${version_lines}")
list(JOIN version_numbers "." TORCHOPS_TORCH_VERSION)
string(REGEX REPLACE "\\.[0-9]+$" "" TORCHOPS_TORCH_MAJOR_MINOR "${TORCHOPS_TORCH_VERSION}")
if(TORCHOPS_TORCH_VERSION VERSION_LESS TORCHOPS_TORCH_MINIMUM)
  message(FATAL_ERROR "torchops needs torch >= ${TORCHOPS_TORCH_MINIMUM}, and ${TORCHOPS_TORCH_DIR} is "
                      "${TORCHOPS_TORCH_VERSION}: run 'pip install --upgrade torch'.")
endif()
message(STATUS "torch ${TORCHOPS_TORCH_VERSION} in ${TORCHOPS_TORCH_DIR}")

add_library(torchops_torch INTERFACE)
# nvcc gets none of them: it takes a minute a file to read them.
target_include_directories(
  torchops_torch SYSTEM
  INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${TORCHOPS_TORCH_DIR}/include;${TORCHOPS_TORCH_DIR}/include/torch/csrc/api/include>")
target_link_libraries(torchops_torch INTERFACE "${TORCHOPS_TORCH_DIR}/lib/libc10.so"
                                               "${TORCHOPS_TORCH_DIR}/lib/libtorch_cpu.so")

# at::parallel_for is a header template: without -fopenmp it silently runs serially, and with another
# copy of the runtime than torch's it would have a thread pool of its own that torch.set_num_threads
# does not reach. So compile with -fopenmp and link the copy that lies beside torch, if there is one.
find_package(OpenMP REQUIRED COMPONENTS CXX)
add_library(torchops_openmp INTERFACE)
target_compile_options(torchops_openmp INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${OpenMP_CXX_FLAGS}>)
file(GLOB bundled_openmp "${TORCHOPS_TORCH_DIR}/lib/libgomp*.so*" "${TORCHOPS_TORCH_DIR}/../torch.libs/libgomp*.so*")
if(bundled_openmp)
  list(GET bundled_openmp 0 bundled_openmp)
  target_link_libraries(torchops_openmp INTERFACE "${bundled_openmp}")
else()
  target_link_libraries(torchops_openmp INTERFACE ${OpenMP_CXX_LIBRARIES})
endif()
