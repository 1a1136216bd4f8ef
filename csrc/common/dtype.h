// Storage types of the kernels, without any torch header.
#pragma once

namespace arcore {

enum class StorageType { kFloat32, kBFloat16, kFloat16 };

}  // namespace arcore
