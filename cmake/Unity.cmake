# Host layers are compiled a folder at a time: torch's headers take longer than what includes them.

option(TORCHOPS_UNITY "Compile the host layers of a folder together" ON)

# Of a target's sources those that are given, where it is in the folder of the caller.
function(torchops_compile_together target)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${TORCHOPS_UNITY} UNITY_BUILD_MODE GROUP)
  foreach(source IN LISTS ARGN)
    get_filename_component(folder "${source}" DIRECTORY)
    file(RELATIVE_PATH folder "${PROJECT_SOURCE_DIR}/csrc" "${folder}")
    string(MAKE_C_IDENTIFIER "${folder}" group)
    set_source_files_properties("${source}" PROPERTIES UNITY_GROUP ${group})
  endforeach()
endfunction()
