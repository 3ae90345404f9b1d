#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "core/argument_structs.h"

// How operators are registered and called. Nothing else in C++ names their namespace.

#define TORCHOPS_NAMESPACE torchops
// { m.def("<schema>"); }
#define TORCHOPS_LIBRARY(m) TORCHOPS_REGISTRATION(TORCH_LIBRARY_FRAGMENT(TORCHOPS_NAMESPACE, library), m)
// { m.impl("<op>", function); } for a dispatch key
#define TORCHOPS_LIBRARY_IMPL(key, m) TORCHOPS_REGISTRATION(TORCH_LIBRARY_IMPL(TORCHOPS_NAMESPACE, key, library), m)

// What follows runs as the body of torch's macro, unless another copy of the library has been loaded.
#define TORCHOPS_REGISTRATION(head, m) TORCHOPS_REGISTRATION_NAMED(head, m, C10_ANONYMOUS_VARIABLE(register_))
#define TORCHOPS_REGISTRATION_NAMED(head, m, register_operators) \
  static void register_operators(torch::Library& m);             \
  head {                                                         \
    if (torchops::registers_operators()) {                       \
      register_operators(library);                               \
    }                                                            \
  }                                                              \
  static void register_operators(torch::Library& m)

namespace torchops {

// Whether this copy of the library is the first in the process. A second one warns and registers nothing: torch throws
// where a name is registered twice, and while a library loads nobody catches that.
bool registers_operators();

// "torchops::<op>"
inline std::string qualified_name(const char* op) {
  return std::string(C10_STRINGIZE(TORCHOPS_NAMESPACE) "::") + op;
}

// An operator as the dispatcher calls it, from the arguments of one of its functions.
template <typename Signature>
class Operator;

template <typename Result, typename... Arguments>
class Operator<Result(Arguments...)> {
 public:
  explicit Operator(const char* op)
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(qualified_name(op).c_str(), "")
                    .typed<Result(Arguments...)>()) {}

  template <typename... Given>
  Result operator()(const Given&... given) const {
    return std::apply([this](const auto&... arguments) { return handle_.call(arguments...); },
                      std::tuple_cat(flat_arguments(given)...));
  }

 private:
  c10::TypedOperatorHandle<Result(Arguments...)> handle_;
};

// The operator of this name, whose signature is that of any function that is registered for it. Finding takes a lock:
//   static const auto op = find_operator<decltype(merge_tokens_meta)>("merge_tokens");
template <typename Function>
Operator<flat_signature<Function>> find_operator(const char* op) {
  return Operator<flat_signature<Function>>(op);
}

}  // namespace torchops
