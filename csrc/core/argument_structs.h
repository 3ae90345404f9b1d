#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

// Functions of an operator with many arguments take some of them as a struct: an aggregate that lists its members in
// the order of the schema. They may be such structs again.
//
//   struct SpanOptions {
//     const std::optional<at::Tensor>& key_bias;
//     const c10::SymInt& left;
//     auto members() const { return std::tie(key_bias, left); }
//   };
//   at::Tensor span_attention_cpu(const at::Tensor& query, const SpanOptions& options);
//
// The dispatcher knows no structs. It calls flattened<span_attention_cpu>, which has members for parameters:
//   at::Tensor (const at::Tensor& query, const std::optional<at::Tensor>& key_bias, c10::SymInt left)

namespace torchops {

template <typename T>
concept ArgumentStruct = requires(const T& value) { value.members(); };

// References to the arguments that a struct stands for, or to the argument itself.
template <typename T>
auto flat_arguments(const T& value) {
  if constexpr (ArgumentStruct<T>) {
    return std::apply([](const auto&... members) { return std::tuple_cat(flat_arguments(members)...); },
                      value.members());
  } else {
    return std::tie(value);
  }
}

namespace detail {

template <typename... T>
using flat_t = decltype(std::tuple_cat(flat_arguments(std::declval<const T&>())...));

// The dispatcher takes tensors by reference, all else by value.
template <typename T>
using argument_t =
    std::conditional_t<std::is_same_v<T, at::Tensor> || std::is_same_v<T, std::optional<at::Tensor>>, const T&, T>;

template <typename Result, typename Flat>
struct Signature;
template <typename Result, typename... T>
struct Signature<Result, std::tuple<const T&...>> {
  using type = Result(argument_t<T>...);
};

template <typename Function>
struct Flat;
template <typename Result, typename... Parameters>
struct Flat<Result(Parameters...)> {
  using type = typename Signature<Result, flat_t<std::remove_cvref_t<Parameters>...>>::type;
};

// How many arguments stand before the one at `index` of a list of parts.
template <typename... Parts>
constexpr size_t arguments_before(size_t index) {
  constexpr size_t counts[] = {std::tuple_size_v<flat_t<Parts>>...};
  size_t sum = 0;
  for (size_t i = 0; i < index; ++i) {
    sum += counts[i];
  }
  return sum;
}

template <typename T>
struct type_of {};

// The argument at `first`, or the struct of those from there on.
template <typename T, size_t first, typename Arguments>
decltype(auto) argument_from(const Arguments& arguments);

// make(the parts) of the arguments from `first` on.
template <size_t first, typename Make, typename Arguments, typename... Parts, size_t... index>
decltype(auto) make_from(const Make& make, const Arguments& arguments, type_of<std::tuple<Parts...>> /*parts*/,
                         std::index_sequence<index...> /*indices*/) {
  return make(argument_from<std::remove_cvref_t<Parts>, first + arguments_before<std::remove_cvref_t<Parts>...>(index)>(
      arguments)...);
}

template <typename T, size_t first, typename Arguments>
decltype(auto) argument_from(const Arguments& arguments) {
  if constexpr (ArgumentStruct<T>) {
    using Members = decltype(std::declval<const T&>().members());
    return make_from<first>([](const auto&... members) { return T{members...}; }, arguments, type_of<Members>{},
                            std::make_index_sequence<std::tuple_size_v<Members>>{});
  } else {
    return std::get<first>(arguments);
  }
}

template <auto function, typename Function, typename Flat>
struct Flattened;
template <auto function, typename Result, typename... Parameters, typename... Arguments>
struct Flattened<function, Result(Parameters...), Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    return make_from<0>(*function, std::tie(arguments...), type_of<std::tuple<Parameters...>>{},
                        std::index_sequence_for<Parameters...>{});
  }
};

}  // namespace detail

// A function type with each struct among the parameters replaced by what it stands for.
template <typename Function>
using flat_signature = typename detail::Flat<Function>::type;

template <auto function>
inline constexpr auto* flattened = detail::Flattened<function, std::remove_pointer_t<decltype(function)>,
                                                     flat_signature<std::remove_pointer_t<decltype(function)>>>::call;

}  // namespace torchops
