#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/dispatch.h"
#include "vlfast/gated_mixture.h"
#include "vlfast/perplexity.h"
#include "vlfast/prefix_attention.h"
#include "vlfast/symmetric_kl.h"

namespace py = pybind11;

namespace {

// A tensor arrives as the integer of its data_ptr(); 0 is null.
using Address = std::uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// `solve` takes the problem and the last argument: the number of threads, or the stream.
template <typename Last, typename Solve>
void define_symmetric_kl(py::module_& module, const char* name, Solve solve) {
  module.def(
      name,
      [solve](int dtype, Address student, Address teacher, Address index, std::int64_t rows,
              std::int64_t classes, std::int64_t teacher_classes, double student_factor,
              double teacher_factor, Address student_scale, Address teacher_scale,
              double forward_weight, double reverse_weight, Address loss, Address gradient,
              Address gradient_of_scale, Last last) {
        vlfast::SymmetricKL problem{};
        problem.dtype = static_cast<vlfast::DType>(dtype);
        problem.student = pointer(student);
        problem.teacher = pointer(teacher);
        problem.index = static_cast<const std::int64_t*>(pointer(index));
        problem.rows = rows;
        problem.classes = classes;
        problem.teacher_classes = teacher_classes;
        problem.student_factor = student_factor;
        problem.teacher_factor = teacher_factor;
        problem.student_scale = pointer(student_scale);
        problem.teacher_scale = pointer(teacher_scale);
        problem.forward_weight = forward_weight;
        problem.reverse_weight = reverse_weight;
        problem.loss = pointer(loss);
        problem.gradient = pointer(gradient);
        problem.gradient_of_scale = pointer(gradient_of_scale);
        solve(problem, last);
      },
      py::call_guard<py::gil_scoped_release>());
}

// `solve` takes the problem and the arguments after it: the number of threads, or the workspace and
// the stream.
template <typename... Last, typename Solve>
void define_perplexity(py::module_& module, const char* name, Solve solve) {
  module.def(
      name,
      [solve](int embedding_dtype, std::int64_t rows, std::int64_t words, std::int64_t width,
              std::int64_t top_k, Address prompts, Address hidden, Address embedding,
              Address vocabulary, Address inverse_norms, double temperature_factor,
              Address temperature, bool detach_targets, Address perplexity, Address inverted,
              Address perplexity_to_hidden, Address inverted_to_prompts,
              Address perplexity_to_prompts, Address inverted_to_hidden, Last... last) {
        vlfast::Perplexity problem{};
        problem.embedding_dtype = static_cast<vlfast::DType>(embedding_dtype);
        problem.rows = rows;
        problem.words = words;
        problem.width = width;
        problem.top_k = top_k;
        problem.prompts = static_cast<const float*>(pointer(prompts));
        problem.hidden = static_cast<const float*>(pointer(hidden));
        problem.embedding = pointer(embedding);
        problem.vocabulary = static_cast<const bool*>(pointer(vocabulary));
        problem.inverse_norms = static_cast<const float*>(pointer(inverse_norms));
        problem.temperature_factor = temperature_factor;
        problem.temperature = static_cast<const float*>(pointer(temperature));
        problem.detach_targets = detach_targets;
        problem.perplexity = static_cast<float*>(pointer(perplexity));
        problem.inverted = static_cast<float*>(pointer(inverted));
        problem.perplexity_to_hidden = static_cast<float*>(pointer(perplexity_to_hidden));
        problem.inverted_to_prompts = static_cast<float*>(pointer(inverted_to_prompts));
        problem.perplexity_to_prompts = static_cast<float*>(pointer(perplexity_to_prompts));
        problem.inverted_to_hidden = static_cast<float*>(pointer(inverted_to_hidden));
        return solve(problem, last...);
      },
      py::call_guard<py::gil_scoped_release>());
}

void gated_mixture_cpu(int text_dtype, std::int64_t images, std::int64_t width, std::int64_t heads,
                       std::int64_t classes, std::int64_t top_k, Address image_features,
                       Address gate, Address text_features, Address student_logits, Address labels,
                       double logit_scale, double temperature, Address distillation,
                       Address selection, Address distillation_to_student,
                       Address distillation_to_scores, Address selection_to_scores, int threads) {
  vlfast::GatedMixture problem{};
  problem.text_dtype = static_cast<vlfast::DType>(text_dtype);
  problem.images = images;
  problem.width = width;
  problem.heads = heads;
  problem.classes = classes;
  problem.top_k = top_k;
  problem.image_features = static_cast<const float*>(pointer(image_features));
  problem.gate = static_cast<const float*>(pointer(gate));
  problem.text_features = pointer(text_features);
  problem.student_logits = static_cast<const float*>(pointer(student_logits));
  problem.labels = static_cast<const std::int64_t*>(pointer(labels));
  problem.logit_scale = logit_scale;
  problem.temperature = temperature;
  problem.distillation = static_cast<float*>(pointer(distillation));
  problem.selection = static_cast<float*>(pointer(selection));
  problem.distillation_to_student = static_cast<float*>(pointer(distillation_to_student));
  problem.distillation_to_scores = static_cast<float*>(pointer(distillation_to_scores));
  problem.selection_to_scores = static_cast<float*>(pointer(selection_to_scores));
  vlfast::gated_mixture_cpu(problem, threads);
}

vlfast::PrefixAttention prefix_attention(int dtype, std::int64_t rows, std::int64_t heads,
                                         std::int64_t width, std::int64_t runs,
                                         std::int64_t prefixes, Address qkv, Address offsets,
                                         double scale) {
  vlfast::PrefixAttention problem{};
  problem.dtype = static_cast<vlfast::DType>(dtype);
  problem.rows = rows;
  problem.heads = heads;
  problem.width = width;
  problem.runs = runs;
  problem.prefixes = prefixes;
  problem.qkv = pointer(qkv);
  problem.offsets = static_cast<const std::int32_t*>(pointer(offsets));
  problem.scale = scale;
  return problem;
}

void prefix_attention_cpu(int dtype, std::int64_t rows, std::int64_t heads, std::int64_t width,
                          std::int64_t runs, std::int64_t prefixes, Address qkv, Address offsets,
                          double scale, Address output, Address log_normaliser, int threads) {
  vlfast::prefix_attention_cpu(
      prefix_attention(dtype, rows, heads, width, runs, prefixes, qkv, offsets, scale),
      {pointer(output), static_cast<float*>(pointer(log_normaliser))}, threads);
}

void prefix_attention_backward_cpu(int dtype, std::int64_t rows, std::int64_t heads,
                                   std::int64_t width, std::int64_t runs, std::int64_t prefixes,
                                   Address qkv, Address offsets, double scale, Address to_output,
                                   Address to_qkv, int threads) {
  vlfast::prefix_attention_backward_cpu(
      prefix_attention(dtype, rows, heads, width, runs, prefixes, qkv, offsets, scale),
      {pointer(to_output), pointer(to_qkv)}, threads);
}

py::dict build_config() {
  py::dict config;
  config["compiler"] = __VERSION__;
  config["cxx_flags"] = VLFAST_CXX_FLAGS;
  config["openmp"] = _OPENMP;
  config["cpu_dispatch"] = VLFAST_DISPATCH_TARGETS;
#ifdef VLFAST_HAS_CUDA
  config["has_cuda"] = true;
#else
  config["has_cuda"] = false;
#endif
  config["cuda_version"] = VLFAST_CUDA_VERSION;
  config["cuda_archs"] = VLFAST_CUDA_ARCHS;
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The kernels of vlfast, on raw pointers.";
  module.def("build_config", &build_config);
  define_symmetric_kl<int>(module, "symmetric_kl_cpu", &vlfast::symmetric_kl_cpu);
  define_perplexity<int>(module, "perplexity_cpu", &vlfast::perplexity_cpu);
  module.def("gated_mixture_cpu", &gated_mixture_cpu, py::call_guard<py::gil_scoped_release>());
  module.def("prefix_attention_cpu", &prefix_attention_cpu,
             py::call_guard<py::gil_scoped_release>());
  module.def("prefix_attention_backward_cpu", &prefix_attention_backward_cpu,
             py::call_guard<py::gil_scoped_release>());
#ifdef VLFAST_HAS_CUDA
  define_symmetric_kl<Address>(module, "symmetric_kl_cuda",
                               [](const vlfast::SymmetricKL& problem, Address stream) {
                                 vlfast::symmetric_kl_cuda(problem, pointer(stream));
                               });
  define_perplexity<>(module, "perplexity_cuda_workspace", &vlfast::perplexity_cuda_workspace);
  define_perplexity<Address, Address>(
      module, "perplexity_cuda",
      [](const vlfast::Perplexity& problem, Address workspace, Address stream) {
        vlfast::perplexity_cuda(problem, pointer(workspace), pointer(stream));
      });
#endif
}
