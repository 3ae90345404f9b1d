#pragma once

// Catch2 2 (tested: 2.13.10) or 3 (not tested).
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
