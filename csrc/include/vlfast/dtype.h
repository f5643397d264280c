#pragma once

namespace vlfast {

// The values are those that the Python side passes.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace vlfast
