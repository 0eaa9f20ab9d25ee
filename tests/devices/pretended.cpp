// A pretended accelerator: PyTorch's PrivateUse1 device with its tensors in ordinary memory. Operations run on the CPU,
// on copies, as in PyTorch's own fallback for devices that lack an operation; those that mix devices fail as on CUDA.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace {

using at::Tensor;
constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// Memory: the heap's, counted, so that torch.accelerator.memory_allocated works.

c10::CachingDeviceAllocator::Stat bytes;

struct Allocator final : c10::DeviceAllocator {
  static void release(void* block) {
    bytes.decrease(*static_cast<size_t*>(block));
    std::free(block);
  }
  c10::DataPtr allocate(size_t size) override {
    constexpr size_t kHeader = 64;  // keeps the alignment, and holds the size
    char* block = static_cast<char*>(std::aligned_alloc(kHeader, (size + 2 * kHeader - 1) / kHeader * kHeader));
    *reinterpret_cast<size_t*>(block) = size;
    bytes.increase(size);
    return {block + kHeader, block, &release, kDevice};
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0] = stats.reserved_bytes[0] = bytes;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override { bytes.reset_accumulated(); }
  void resetPeakStats(c10::DeviceIndex) override { bytes.reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {size_t(8) << 30, size_t(8) << 30}; }
};

Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator)

// One device, without streams.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// Operations.

bool is_pretended(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// On CUDA too, numbers and the indices of a gather may lie on the CPU.
bool may_be_on_cpu(const c10::OperatorHandle& op, const Tensor& tensor) {
  static const std::set<std::string> kIndexing = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
  return tensor.dim() == 0 || kIndexing.count(op.operator_name().name) > 0;
}

void check_devices(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<Tensor> tensors;
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) tensors.push_back(value.toTensor());
    if (value.isTensorList()) for (const Tensor& each : value.toTensorVector()) tensors.push_back(each);
    if (value.isOptionalTensorList())
      for (const std::optional<Tensor>& each : value.toOptionalTensorVector())
        if (each.has_value()) tensors.push_back(*each);
  }
  bool any = std::any_of(tensors.begin(), tensors.end(), is_pretended);
  for (const Tensor& tensor : tensors)
    TORCH_CHECK(!any || !tensor.defined() || is_pretended(tensor) || may_be_on_cpu(op, tensor),
                "Expected all tensors to be on the same device, but found at least two devices, ", kDevice, " and ",
                tensor.device(), ", in ", op.operator_name());
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, stack);
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

// The same memory as a tensor of the CPU.
Tensor seen_by_cpu(const Tensor& tensor) {
  if (!is_pretended(tensor)) return tensor;
  void* data = const_cast<void*>(tensor.const_data_ptr());
  return at::from_blob(data, tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  c10::InferenceMode guard(false);
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

const Tensor& resize(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (self.sizes() == size) return self;
  Tensor larger = at::empty(size, self.options());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(larger.storage());
  self.unsafeGetTensorImpl()->set_storage_offset(0);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  if (stride.empty()) self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  else self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  int64_t size = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {size}, {});
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  TORCH_CHECK(is_pretended(input) && is_pretended(weight) && (!bias || !bias->defined() || is_pretended(*bias)),
              "Expected all tensors to be on the same device, but found at least two devices, ", kDevice,
              " and cpu, in aten::convolution");
  std::optional<Tensor> cpu_bias;
  if (bias && bias->defined()) cpu_bias = seen_by_cpu(*bias);
  return at::convolution_symint(seen_by_cpu(input), seen_by_cpu(weight), cpu_bias, stride, padding, dilation, transposed,
                                output_padding, groups)
      .to(kDevice);
}

// `tensor.data = other` may change the device, as between CPU and CUDA.
bool may_take_data_of(const Tensor&, const Tensor&) { return true; }

int64_t attention_kernel(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // the one made of products and a softmax
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_kernel)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("as_strided", [](const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                          std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(self, size, stride, offset);
  });
  m.impl("_reshape_alias", [](const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::as_strided_tensorimpl(self, size, stride, std::nullopt);
  });
  m.impl("view", [](const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); });
  m.impl("unfold", [](const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
    return at::native::unfold(self, dimension, size, step);
  });
  m.impl("convolution_overrideable", convolution);
  m.impl("_has_compatible_shallow_copy_type", may_take_data_of);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION) }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { at::RegisterPrivateUse1HooksInterface(new Hooks); }
