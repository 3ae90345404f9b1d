#include "core/library.h"

#include <dlfcn.h>
#include <link.h>

#include <string>
#include <vector>

#include "core/export.h"

// By this name copies of the library find each other.
extern "C" TORCHOPS_API const char torchops_library = 0;

namespace torchops {
namespace {

// Has an address in this copy. That of the exported name may be the other's: global symbols come from the first copy.
const char here = 0;

// The file that an address was loaded from.
std::string file_of(const void* address) {
  Dl_info info;
  return dladdr(address, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "a program";
}

int append_name(dl_phdr_info* object, size_t, void* names) {
  static_cast<std::vector<std::string>*>(names)->emplace_back(object->dlpi_name);
  return 0;
}

std::string other_copy() {
  std::vector<std::string> names;
  dl_iterate_phdr(append_name, &names);
  for (const auto& name : names) {
    void* const handle = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) {
      continue;
    }
    const void* const found = dlsym(handle, "torchops_library");
    dlclose(handle);
    if (found != nullptr && file_of(found) != file_of(&here)) {
      return file_of(found);
    }
  }
  return "of a file without a name";
}

}  // namespace

bool registers_operators() {
  static const bool alone = [] {
    if (!c10::Dispatcher::singleton().findSchema({qualified_name("merge_tokens"), ""})) {
      return true;
    }
    TORCH_WARN("torchops: ", file_of(&here),
               " registers nothing, for this process has loaded another copy of the library, ", other_copy(),
               ": its operators stay");
    return false;
  }();
  return alone;
}

}  // namespace torchops
