# Kernel files are compiled once per instruction-set level; the best level the CPU has is chosen when
# the library is loaded (csrc/core/cpu/level.h). A level is a name and its compiler flags. The highest one, amx, has
# tiles and files of its own, *_tiles.cpp; for kernels without tiles it uses the objects of the level below.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(TORCHOPS_CPU_LEVELS baseline avx2 avx512 avx512_bf16 amx)
  # csrc/core/cpu/features.cpp asks the CPU for exactly these features.
  set(TORCHOPS_FLAGS_baseline -march=x86-64-v2)
  set(TORCHOPS_FLAGS_avx2 ${TORCHOPS_FLAGS_baseline} -mavx2 -mfma -mf16c)
  set(TORCHOPS_FLAGS_avx512 ${TORCHOPS_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq
                            -mprefer-vector-width=512)
  set(TORCHOPS_FLAGS_avx512_bf16 ${TORCHOPS_FLAGS_avx512} -mavx512bf16)
  # Flags one by one: -march of a processor with tiles would allow AVX512_FP16 and more.
  set(TORCHOPS_FLAGS_amx ${TORCHOPS_FLAGS_avx512_bf16} -mavx512vbmi2 -mamx-tile -mamx-bf16)
else()
  set(TORCHOPS_CPU_LEVELS baseline)
endif()

function(torchops_add_cpu_kernels target)
  foreach(level IN LISTS TORCHOPS_CPU_LEVELS)
    set(objects ${target}_kernels_${level})
    set(sources ${ARGN})
    if(level STREQUAL "amx")
      list(FILTER sources INCLUDE REGEX "_tiles\\.cpp$")
    else()
      list(FILTER sources EXCLUDE REGEX "_tiles\\.cpp$")
    endif()
    add_library(${objects} OBJECT ${sources})
    target_include_directories(${objects} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
    target_compile_definitions(${objects} PRIVATE TORCHOPS_LEVEL=${level})
    target_compile_options(${objects} PRIVATE ${TORCHOPS_FLAGS_${level}})
    if(level STREQUAL "amx")
      # Tiles are released by a destructor, for which exceptions would need a symbol of the C++ runtime.
      target_compile_options(${objects} PRIVATE -fno-exceptions)
    endif()
    if(NOT TORCHOPS_SANITIZE)
      target_compile_options(${objects} PRIVATE -O3)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
