#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulated {

Device device;
dim3 grid, block;
uint3 block_index;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 64 * 1024;
#else
constexpr std::size_t kStackBytes = 32 * 1024;
#endif
constexpr int kBarriers = 16;
constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  std::size_t zeros;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t entry;
  void* resume[5];
  bool started;
  bool runnable;
  bool done;
  unsigned number;
  uint3 index;
  void* request;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Barrier {
  unsigned threads = 0;
  int line = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  unsigned mask = 0;
  unsigned arrived = 0;
  int line = 0;
  unsigned runnable = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<unsigned> order;  // the threads as they take turns, warp by warp
std::vector<unsigned> place;  // of each thread in `order`
std::vector<Warp> warps;      // by the thread's number / 32
std::vector<Barrier> barriers;
std::map<std::pair<std::string, int>, std::unique_ptr<char[]>> shared_variables;
std::unique_ptr<char[]> dynamic_memory;
// By the kernel and the shared_per_block of the device.
std::map<std::pair<const void*, int>, int> shared_allowed;
const std::function<void()>* body;
Fiber* current;
Fiber host;
unsigned unfinished;
std::string failure;
std::string last_error;

#if defined(__SANITIZE_ADDRESS__)
const void* host_bottom = nullptr;
std::size_t host_bytes = 0;
#endif

std::unique_ptr<char[]> poisoned(std::size_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), kPoison, bytes);
  return memory;
}

// Without the instrumentation that clears the whole stack at every long jump.
__attribute__((noinline, no_sanitize("address"))) void switch_to(Fiber& next) {
  Fiber& previous = *current;
  current = &next;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const bool to_host = &next == &host;
  __sanitizer_start_switch_fiber(previous.done ? nullptr : &fake_stack,
                                 to_host ? host_bottom : next.stack.get(),
                                 to_host ? host_bytes : kStackBytes);
#endif
  if (__builtin_setjmp(previous.resume) == 0) {
    if (next.started) __builtin_longjmp(next.resume, 1);
    next.started = true;
    setcontext(&next.entry);
  }
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
#endif
}

Warp& warp_of(const Fiber& fiber) { return warps[fiber.number / kWarp]; }

void set_runnable(Fiber& fiber, bool runnable) {
  if (fiber.runnable == runnable) return;
  fiber.runnable = runnable;
  runnable ? ++warp_of(fiber).runnable : --warp_of(fiber).runnable;
}

Fiber* next_of_warp(unsigned after) {
  const unsigned begin = after / kWarp * kWarp;
  const unsigned end = std::min<unsigned>(begin + kWarp, order.size());
  for (unsigned i = 1; i <= end - begin; ++i) {
    Fiber& fiber = *fibers[order[begin + (after - begin + i) % (end - begin)]];
    if (fiber.runnable) return &fiber;
  }
  return nullptr;
}

Fiber* next_fiber() {
  const unsigned start = current == &host ? order.size() - 1 : place[current->number];
  const unsigned count = warps.size();
  for (unsigned i = 0; i <= count; ++i) {
    const unsigned position = (start / kWarp + i) % count * kWarp;
    if (warps[order[position] / kWarp].runnable == 0) continue;
    if (Fiber* fiber = next_of_warp(i == 0 ? start : position)) return fiber;
  }
  return nullptr;
}

std::string stuck() {
  std::string message = "some threads wait for others that never come:";
  for (int id = 0; id < kBarriers; ++id) {
    if (barriers[id].waiting.empty()) continue;
    message += " " + std::to_string(barriers[id].waiting.size()) + " of " +
               std::to_string(barriers[id].threads) + " at barrier " + std::to_string(id) +
               " of line " + std::to_string(barriers[id].line) + ";";
  }
  for (const Warp& warp : warps) {
    if (warp.arrived) message += " lanes of a warp at line " + std::to_string(warp.line) + ";";
  }
  return message;
}

// Runs others until someone sets this fiber runnable again.
void yield() {
  Fiber* next = next_fiber();
  if (next == nullptr) fail(stuck());
  if (next != current) switch_to(*next);
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (host_bottom == nullptr) {
    host_bottom = bottom;
    host_bytes = bytes;
  }
#endif
  (*body)();
  if (!current->groups.empty() || !current->uncommitted.empty()) wait_for_copies(0);
  current->done = true;
  set_runnable(*current, false);
  --unfinished;
  Fiber* next = unfinished ? next_fiber() : &host;
  if (next == nullptr) fail(stuck());
  switch_to(*next);
  __builtin_unreachable();
}

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
  }
}

bool copies_are_late() { return device.schedule % 2 != 0; }

void arrange(unsigned threads) {
  const unsigned count = (threads + kWarp - 1) / kWarp;
  std::vector<unsigned> of_warps(count), of_lanes(kWarp);
  for (unsigned w = 0; w < count; ++w) of_warps[w] = w;
  for (unsigned l = 0; l < kWarp; ++l) of_lanes[l] = l;
  std::mt19937 generator(device.schedule);
  if (device.schedule == 1) {
    std::reverse(of_warps.begin(), of_warps.end());
    std::reverse(of_lanes.begin(), of_lanes.end());
  } else if (device.schedule > 1) {
    std::shuffle(of_warps.begin(), of_warps.end(), generator);
    std::shuffle(of_lanes.begin(), of_lanes.end(), generator);
  }
  order.clear();
  place.assign(threads, 0);
  for (unsigned w : of_warps) {
    for (unsigned l : of_lanes) {
      place[w * kWarp + l] = order.size();
      order.push_back(w * kWarp + l);
    }
  }
}

void run_block(std::size_t shared) {
  const unsigned threads = block.x * block.y * block.z;
  shared_variables.clear();
  dynamic_memory = poisoned(shared);
  barriers.assign(kBarriers, Barrier());
  warps.assign(threads / kWarp, Warp());
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[kStackBytes]);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, run_fiber, 0);
#if defined(__SANITIZE_ADDRESS__)
    // A launch that failed has left the frames of its fibers behind.
    __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
    fiber.number = i;
    fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    fiber.started = fiber.done = fiber.runnable = false;
    fiber.uncommitted.clear();
    fiber.groups.clear();
    set_runnable(fiber, true);
  }
  unfinished = threads;
  host.started = true;
  current = &host;
  switch_to(*next_fiber());
}

}  // namespace

const uint3& thread_index() { return current->index; }

int lane() { return current->number % kWarp; }

void fail(const std::string& message) {
  failure = message;
  switch_to(host);
  __builtin_unreachable();
}

void wait_at_barrier(int id, unsigned threads, int line) {
  Barrier& barrier = barriers.at(id);
  if (barrier.waiting.empty()) {
    barrier.threads = threads;
    barrier.line = line;
  } else if (barrier.threads != threads || barrier.line != line) {
    fail("threads meet at barrier " + std::to_string(id) + " from lines " +
         std::to_string(barrier.line) + " and " + std::to_string(line));
  }
  barrier.waiting.push_back(current);
  if (barrier.waiting.size() == threads) {
    for (Fiber* fiber : barrier.waiting) set_runnable(*fiber, true);
    barrier.waiting.clear();
    return;
  }
  set_runnable(*current, false);
  yield();
}

void cooperate(unsigned mask, int line, void* request, void (*serve)(void* const* requests)) {
  Warp& warp = warp_of(*current);
  if (!(mask >> lane() & 1)) fail("a lane outside the mask at line " + std::to_string(line));
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.line = line;
  } else if (warp.mask != mask || warp.line != line) {
    fail("lanes of a warp meet at lines " + std::to_string(warp.line) + " and " +
         std::to_string(line) + ", or with other masks");
  }
  current->request = request;
  warp.arrived |= 1u << lane();
  if (warp.arrived != mask) {
    set_runnable(*current, false);
    yield();
    return;
  }
  const unsigned first = current->number / kWarp * kWarp;
  void* requests[kWarp];
  for (int l = 0; l < kWarp; ++l) {
    requests[l] = mask >> l & 1 ? fibers[first + l]->request : nullptr;
  }
  serve(requests);
  warp.arrived = 0;
  for (int l = 0; l < kWarp; ++l) {
    if (mask >> l & 1) set_runnable(*fibers[first + l], true);
  }
}

void* shared_variable(const char* file, int line, std::size_t bytes) {
  auto& memory = shared_variables[{file, line}];
  if (!memory) memory = poisoned(bytes);
  return memory.get();
}

void* dynamic_shared() { return dynamic_memory.get(); }

void copy_asynchronously(void* to, const void* from, std::size_t bytes, std::size_t zeros) {
  std::memset(to, kPoison, bytes + zeros);
  current->uncommitted.push_back({to, from, bytes, zeros});
  if (!copies_are_late()) perform({current->uncommitted.back()});
}

void commit_copies() { current->groups.push_back(std::exchange(current->uncommitted, {})); }

void wait_for_copies(std::size_t pending_groups) {
  while (current->groups.size() > pending_groups) {
    if (copies_are_late()) perform(current->groups.front());
    current->groups.pop_front();
  }
}

void launch_body(const void* kernel, dim3 grid_of_launch, dim3 block_of_launch, std::size_t shared,
                 const std::function<void()>& body_of_launch) {
  const unsigned threads = block_of_launch.x * block_of_launch.y * block_of_launch.z;
  const std::size_t blocks =
      std::size_t{1} * grid_of_launch.x * grid_of_launch.y * grid_of_launch.z;
  const auto allowed = shared_allowed.find({kernel, device.shared_per_block});
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) {
    last_error = "a block of " + std::to_string(threads) + " threads";
  } else if (blocks == 0 || grid_of_launch.y > 65535 || grid_of_launch.z > 65535) {
    last_error = "a grid of no blocks, or of too many";
  } else if (shared > kSharedWithoutAsking &&
             (allowed == shared_allowed.end() || shared > std::size_t(allowed->second))) {
    last_error = "more shared memory than cudaFuncSetAttribute has allowed";
  }
  if (!last_error.empty()) return;
  grid = grid_of_launch;
  block = block_of_launch;
  body = &body_of_launch;
  arrange(threads);
  for (std::size_t i = 0; i < blocks && failure.empty(); ++i) {
    const std::size_t b = device.schedule == 1 ? blocks - 1 - i : i;
    block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y),
                   unsigned(b / grid.x / grid.y)};
    run_block(shared);
  }
  last_error = std::exchange(failure, "");
  shared_variables.clear();
  dynamic_memory.reset();
}

}  // namespace emulated

cudaError_t cudaGetLastError() {
  static std::string reported;
  if (emulated::last_error.empty()) return cudaSuccess;
  reported = std::exchange(emulated::last_error, "");
  return reported.c_str();
}

const char* cudaGetErrorString(cudaError_t error) { return error ? error : "no error"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulated::device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulated::device.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulated::device.shared_per_multiprocessor;
      return cudaSuccess;
  }
  return "unknown attribute";
}

cudaError_t emulated_set_attribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulated::device.shared_per_block) return "too much shared memory for the device";
  const auto allowed =
      emulated::shared_allowed.emplace(std::pair{kernel, emulated::device.shared_per_block}, value);
  if (allowed.first->second != value) return "a limit that would race with that of other threads";
  return cudaSuccess;
}
