// Numbers of rows as they come from the caller, for kernels that cannot check them on the host.
#pragma once

namespace arcore {

struct NamedRows {
  const void* data;  // [batch] int64 or int32, or null: row b for row b
  bool narrow;       // int32
};

}  // namespace arcore
