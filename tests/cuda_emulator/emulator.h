#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A GPU of one thread: blocks run one after the other, and the threads of a block are fibers, each
// of which runs until it has to wait for others. What a GPU would leave undefined is an error here,
// which the next cudaGetLastError reports, or poisoned (a NaN in any floating type).
namespace emulated {

constexpr int kWarp = 32;
constexpr int kPoison = 0xff;

struct Device {
  int multiprocessors = 4;
  int shared_per_block = 227 * 1024;
  int shared_per_multiprocessor = 228 * 1024;
  // 0: blocks, warps and lanes run in order, and asynchronous copies happen at once. 1: in the
  // opposite order, and copies happen as late as they may. Else: shuffled with it as the seed, the
  // copies early where it is even. Results that depend on it betray a missing barrier.
  int schedule = 0;
};

extern Device device;
extern dim3 grid, block;
extern uint3 block_index;
const uint3& thread_index();

// Ends the block that runs, and the launch.
[[noreturn]] void fail(const std::string& message);

// Waits until `threads` threads have called it with this id, from the same line.
void wait_at_barrier(int id, unsigned threads, int line);

// Waits until all lanes of the mask have called it from the same line. The last of them serves
// all: requests[lane] is null for a lane outside the mask.
void cooperate(unsigned mask, int line, void* request, void (*serve)(void* const* requests));
int lane();

// The block's instance of a __shared__ variable.
void* shared_variable(const char* file, int line, std::size_t bytes);
void* dynamic_shared();

void copy_asynchronously(void* to, const void* from, std::size_t bytes, std::size_t zeros);
void commit_copies();
void wait_for_copies(std::size_t pending_groups);

void launch_body(const void* kernel, dim3 grid, dim3 block, std::size_t shared,
                 const std::function<void()>& body);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, void*,
            Arguments... arguments) {
  launch_body(reinterpret_cast<const void*>(kernel), grid, block, shared,
              [=] { kernel(arguments...); });
}

}  // namespace emulated
