// The checkers find mistakes: every mutant runs in each of the three ways, in a process of its own.

#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "catch.h"

namespace {

struct Run {
  int status;
  std::string output;
};

Run run(const std::string& way, const std::string& mutant) {
  const std::string command = SIMT_MUTANTS + way + " " + mutant + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  Run result;
  std::array<char, 4096> buffer;
  while (const size_t count = fread(buffer.data(), 1, buffer.size(), pipe)) {
    result.output.append(buffer.data(), count);
  }
  const int status = pclose(pipe);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return result;
}

// What a run must end with: nothing where it says unnoticed, otherwise an error with all of these texts.
struct Expectation {
  const char* way;
  std::vector<const char*> texts;
};
const std::vector<const char*> unnoticed;

void check(const std::string& mutant, const std::vector<Expectation>& expectations) {
  for (const Expectation& expectation : expectations) {
    const Run result = run(expectation.way, mutant);
    INFO(expectation.way << " " << mutant << " ended with " << result.status << "\n" << result.output);
    CHECK((result.status == 0) == expectation.texts.empty());
    for (const char* text : expectation.texts) {
      CHECK_THAT(result.output, Catch::Matchers::Contains(text));
    }
  }
}

const char* const race = "ThreadSanitizer: data race";
const char* const out_of_bounds = "AddressSanitizer: heap-buffer-overflow";

}  // namespace

TEST_CASE("sample kernels without a mistake pass") {
  for (const char* kernel : {"center_rows", "matmul", "segment_sum", "add_up"}) {
    check(std::string(kernel) + " none", {{"plain", unnoticed}, {"asan", unnoticed}, {"tsan", unnoticed}});
  }
}

TEST_CASE("a barrier that is missing is found") {
  check("center_rows no_barrier",
        {{"plain", {"the results of the orders", "differ"}}, {"tsan", {race, "center_rows.cuh:"}}});
  check("matmul no_barrier", {{"plain", {"differ"}}, {"tsan", {race, "matmul.cuh:"}}});
  check("matmul no_refill_barrier", {{"plain", {"differ"}}, {"tsan", {race, "matmul.cuh:"}}});
}

TEST_CASE("a barrier that is missing without an effect on the numbers is found by the race checker") {
  check("center_rows harmless_race", {{"plain", unnoticed}, {"asan", unnoticed}, {"tsan", {race, "center_rows.cuh:"}}});
}

TEST_CASE("a missing syncwarp is found") {
  check("segment_sum no_syncwarp", {{"plain", {"differ"}}, {"tsan", {race, "segment_sum.cuh:"}}});
}

TEST_CASE("a missing predicate is found") {
  check("matmul no_predicate", {{"asan", {out_of_bounds, "matmul.cuh:"}}});
}

TEST_CASE("a write behind a shared array is found") {
  check("center_rows shared_overrun", {{"asan", {out_of_bounds, "center_rows.cuh:"}}});
}

TEST_CASE("a vector access off its alignment is found") {
  check("center_rows misaligned", {{"asan", {"runtime error", "misaligned address", "center_rows.cuh:"}}});
}

TEST_CASE("a wait for asynchronous copies that is missing or too weak is found") {
  for (const char* mutant : {"matmul no_wait", "matmul weak_wait"}) {
    check(mutant, {{"plain", {"wrong numbers"}}, {"asan", {"wrong numbers"}}, {"tsan", {"wrong numbers"}}});
  }
}

TEST_CASE("a plain addition in place of an atomic one is a race between blocks, found by the race checker") {
  check("add_up no_atomic", {{"plain", unnoticed}, {"tsan", {race, "add_up.cuh:", "block [1, 0, 0]"}}});
}

TEST_CASE("a barrier that not all threads reach is reported with its line") {
  check("center_rows divergent_barrier",
        {{"plain", {"deadlock", "threads 0-71 in syncthreads at center_rows.cuh:", "threads 72-127 returned"}}});
  check("center_rows early_return", {{"plain", {"deadlock", "in syncthreads at center_rows.cuh:", "72-127 returned"}}});
}

TEST_CASE("a shuffle that not all lanes reach is reported with its line") {
  check("center_rows partial_shuffle", {{"plain", {"divergence", "shuffle_xor", "in shuffle at center_rows.cuh:"}}});
}
