// Lets a test read what a failed launch would say.
#include <cstdint>
#include <cstring>

#include "common/cuda_call.h"

extern "C" __attribute__((visibility("default"))) void launch_message(int error, int capability,
                                                                      const char* archs, char* out,
                                                                      int64_t room) {
  const std::string text = arcore::launch_error(error, "cudaErrorName", capability, archs);
  std::strncpy(out, text.c_str(), static_cast<size_t>(room) - 1);
}
