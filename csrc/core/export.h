#pragma once

// Marks what libtorchops offers to programs that link it; everything else stays inside.
#define TORCHOPS_API __attribute__((visibility("default")))
