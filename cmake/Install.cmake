# What a wheel (and a plain `cmake --install`) contains besides the Python files: the library, the
# public headers, and a CMake package that finds both.

include(CMakePackageConfigHelpers)
set(package_dir share/cmake/torchops)

install(TARGETS torchops LIBRARY DESTINATION lib)
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
