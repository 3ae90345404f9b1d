# Compiles through ccache where it is installed. Paths inside the checkout are hashed relative to it, so that another
# clone of the same sources, and a build of the wheel, compile nothing again.

find_program(TORCHOPS_CCACHE_PROGRAM ccache)
option(TORCHOPS_CCACHE "Compile through ccache where it is installed" ON)
if(TORCHOPS_CCACHE AND TORCHOPS_CCACHE_PROGRAM)
  message(STATUS "ccache: ${TORCHOPS_CCACHE_PROGRAM}")
  set(CMAKE_CXX_COMPILER_LAUNCHER
      "${CMAKE_COMMAND}" -E env "CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}" CCACHE_NOHASHDIR=1 "${TORCHOPS_CCACHE_PROGRAM}")
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
