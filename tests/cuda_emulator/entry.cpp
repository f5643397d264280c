// What the tests call, through ctypes. The structures pass as they are.

#include <cstddef>
#include <exception>
#include <string>

#include "emulator.h"
#include "vlfast/perplexity.h"
#include "vlfast/symmetric_kl.h"

namespace vlfast {
void make_mistake(const float* from, float* to, int mistake);
}

namespace {

std::string message;

template <typename Call>
const char* error_of(Call call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void set_device(const emulated::Device* device) { emulated::device = *device; }

const char* symmetric_kl(const vlfast::SymmetricKL* problem) {
  return error_of([=] { vlfast::symmetric_kl_cuda(*problem, nullptr); });
}

std::size_t perplexity_workspace(const vlfast::Perplexity* problem) {
  return vlfast::perplexity_cuda_workspace(*problem);
}

const char* perplexity(const vlfast::Perplexity* problem, void* workspace) {
  return error_of([=] { vlfast::perplexity_cuda(*problem, workspace, nullptr); });
}

const char* mistake(const float* from, float* to, int mistake) {
  return error_of([=] { vlfast::make_mistake(from, to, mistake); });
}
}
