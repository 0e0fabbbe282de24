// torch's own threads.
#pragma once
#include <cstdint>
#include <type_traits>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* data);

namespace mue {

// f(i) for i from 0 to count, each on one thread; false where torch refused.
template <class F> bool parallel(int64_t count, F&& f) {
  auto run = [](int64_t begin, int64_t end, void* data) {
    for (int64_t i = begin; i < end; i++) (*static_cast<std::remove_reference_t<F>*>(data))(i);
  };
  return torch_parallel_for(0, count, 1, run, &f) == 0;
}

}  // namespace mue
