// CUDA without a GPU: the device guard, the hooks and the pinned memory that a CPU build of torch lacks.
//
// Fake tensors on "cuda" have shapes and types, but no data. With this library their operators find a device, a stream
// and, in autograd, a thread of that device, as on a GPU. Nothing is computed. The library must be loaded before torch is
// imported, because torch asks for the hooks of an accelerator only once.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace {

constexpr c10::DeviceType CUDA = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex DEVICES = 8;

// One device is current for ever, with its default stream; events have always happened.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device here() { return {CUDA, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, here()); }

  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return here(); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// Ordinary memory that `Tensor.is_pinned` recognises: start and end of every block in use.
struct Pinned final : c10::Allocator {
  static std::mutex& mutex() {
    static std::mutex held;
    return held;
  }
  static std::map<std::uintptr_t, std::uintptr_t>& blocks() {
    static std::map<std::uintptr_t, std::uintptr_t> known;
    return known;
  }

  static bool holds(const void* data) {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::lock_guard<std::mutex> lock(mutex());
    auto after = blocks().upper_bound(address);
    return after != blocks().begin() && address < (--after)->second;
  }

  static void release(void* data) {
    const std::lock_guard<std::mutex> lock(mutex());
    blocks().erase(reinterpret_cast<std::uintptr_t>(data));
    c10::free_cpu(data);
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    if (data != nullptr) {
      const auto address = reinterpret_cast<std::uintptr_t>(data);
      const std::lock_guard<std::mutex> lock(mutex());
      blocks()[address] = address + bytes;
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Pinned pinned;

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {

// Says that there is an accelerator; what these functions do not name still fails. Torch looks them up by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return DEVICES; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
