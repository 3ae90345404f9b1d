# What a wheel (and a plain `cmake --install`) contains besides the Python files: the library, the
# public headers, a CMake package that finds both, and what the import needs to know before it loads anything.
#
# A package for several versions of torch is what as many builds install under one prefix. Each is told of all versions
# and writes the same files, but for the library, which lies in a folder of its version.

include(CMakePackageConfigHelpers)
set(package_dir share/cmake/torchops)

set(TORCHOPS_TORCH_VERSIONS "" CACHE STRING "Versions of torch that the package serves, if not only the one at hand")
set(TORCHOPS_LIBRARY_DIR "torch-{release}")
if(NOT TORCHOPS_TORCH_VERSIONS)
  set(TORCHOPS_TORCH_VERSIONS ${TORCHOPS_TORCH_VERSION})
  set(TORCHOPS_LIBRARY_DIR lib)
elseif(NOT TORCHOPS_TORCH_VERSION IN_LIST TORCHOPS_TORCH_VERSIONS)
  message(FATAL_ERROR "TORCHOPS_TORCH_VERSIONS is ${TORCHOPS_TORCH_VERSIONS}, and ${TORCHOPS_TORCH_DIR} is torch "
                      "${TORCHOPS_TORCH_VERSION}: name it among them.")
endif()

string(REPLACE "{release}" "${TORCHOPS_TORCH_MAJOR_MINOR}" library_dir "${TORCHOPS_LIBRARY_DIR}")
install(TARGETS torchops LIBRARY DESTINATION "${library_dir}")
configure_file(cmake/_build.py.in "${PROJECT_BINARY_DIR}/_build.py" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/_build.py" DESTINATION .)

# The public headers: torchops.h, each family's <family>/<family>.h, and what they include.
file(GLOB family_folders RELATIVE "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/*")
foreach(family IN LISTS family_folders)
  if(EXISTS "${PROJECT_SOURCE_DIR}/csrc/${family}/${family}.h")
    install(FILES "csrc/${family}/${family}.h" DESTINATION "include/torchops/${family}")
  endif()
endforeach()
install(FILES csrc/torchops.h DESTINATION include/torchops)
install(FILES csrc/core/export.h DESTINATION include/torchops/core)

configure_package_config_file(cmake/torchopsConfig.cmake.in "${PROJECT_BINARY_DIR}/torchopsConfig.cmake"
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file("${PROJECT_BINARY_DIR}/torchopsConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/torchopsConfig.cmake" "${PROJECT_BINARY_DIR}/torchopsConfigVersion.cmake"
        DESTINATION ${package_dir})
