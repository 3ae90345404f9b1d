// Runs one sample kernel with one mistake: `mutants matmul no_wait`. It ends with 0 if nobody noticed,
// 1 after "wrong numbers" or an error of the engine, or as the sanitizer pleases.

#include <cstdio>
#include <exception>
#include <string_view>

#include "samples/run.h"

using namespace torchops::kernels;
using namespace torchops::kernels::samples;

namespace {

struct Mutant {
  std::string_view kernel;
  std::string_view mutation;
  Outcome (*run)();
};

#define MUTANT(kernel, mutation, ...) {#kernel, #mutation, [] { return run_##kernel<__VA_ARGS__>(); }}

const Mutant mutants[] = {
    MUTANT(center_rows, none, float),
    MUTANT(center_rows, no_barrier, float, Mutation::no_barrier),
    MUTANT(center_rows, divergent_barrier, float, Mutation::divergent_barrier),
    MUTANT(center_rows, early_return, float, Mutation::early_return),
    MUTANT(center_rows, partial_shuffle, float, Mutation::partial_shuffle),
    MUTANT(center_rows, shared_overrun, float, Mutation::shared_overrun),
    MUTANT(center_rows, harmless_race, float, Mutation::harmless_race),
    MUTANT(center_rows, misaligned, float, Mutation::misaligned),
    MUTANT(matmul, none, bfloat16),
    MUTANT(matmul, no_barrier, bfloat16, Mutation::no_barrier),
    MUTANT(matmul, no_refill_barrier, bfloat16, Mutation::no_refill_barrier),
    MUTANT(matmul, no_predicate, bfloat16, Mutation::no_predicate),
    MUTANT(matmul, no_wait, bfloat16, Mutation::no_wait),
    MUTANT(matmul, weak_wait, bfloat16, Mutation::weak_wait),
    MUTANT(segment_sum, none, float),
    MUTANT(segment_sum, no_syncwarp, float, Mutation::no_syncwarp),
    MUTANT(add_up, none),
    MUTANT(add_up, no_atomic, Mutation::no_atomic),
};

}  // namespace

int main(int argc, char** argv) {
  for (const Mutant& mutant : mutants) {
    if (argc == 3 && mutant.kernel == argv[1] && mutant.mutation == argv[2]) {
      try {
        const Outcome outcome = mutant.run();
        if (outcome.actual != outcome.expected) {
          std::fputs("wrong numbers\n", stderr);
          return 1;
        }
        return 0;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
      }
    }
  }
  std::fputs("usage: mutants <kernel> <mutation>\n", stderr);
  return 2;
}
