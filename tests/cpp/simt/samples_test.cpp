// The sample kernels, without mistakes: what a kernel test looks like.

#include "catch.h"
#include "samples/run.h"

using namespace torchops::kernels;
using namespace torchops::kernels::samples;

TEMPLATE_TEST_CASE("center_rows", "", float, bfloat16, float16) {
  for (const int64_t num_columns : {1, 31, 32, 72, 300}) {
    const Outcome outcome = run_center_rows<TestType>(3, num_columns, 64);
    CHECK(outcome.actual == outcome.expected);
  }
}

TEMPLATE_TEST_CASE("matmul", "", bfloat16, float16) {
  for (const int k : {8, 32, 104}) {
    const Outcome outcome = run_matmul<TestType>(50, 40, k);
    CHECK(outcome.actual == outcome.expected);
  }
}

TEMPLATE_TEST_CASE("segment_sum", "", float, bfloat16) {
  const Outcome outcome = run_segment_sum<TestType>(9, 6, 40);
  CHECK(outcome.actual == outcome.expected);
}

TEST_CASE("segment_sum of long segments") {
  const Outcome outcome = run_segment_sum<float>(100, 5, 3);
  CHECK(outcome.actual == outcome.expected);
}

TEST_CASE("add_up") {
  const Outcome outcome = run_add_up();
  CHECK(outcome.actual == outcome.expected);
}
