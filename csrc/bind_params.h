// Binds the structs of params.h, once for all ops: Python makes one from keyword arguments, then runs kernels on it.
//
// A field is written twice: in its struct, and in the one line that names it here for Python (bind_ops.h). Addresses
// come as integers, lists as Python lists, enums by their names. A name that no field has is refused, so that a typing
// error in Python cannot leave a pointer null.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "params.h"

namespace fastnas {

namespace py = pybind11;
using Address = uintptr_t;

template <class Number> std::string text(Number n) { return std::to_string(n); }

// A params struct, and whatever its pointers to lists point to: freed with it, not before.
template <class P>
struct Bound {
  P params;
  std::vector<std::shared_ptr<void>> alive;
};

// The names of an enum's values as Python spells them, in the order of the values.
template <class E> std::vector<std::string> names_of();
template <> inline std::vector<std::string> names_of<DType>() { return {"float32", "bfloat16", "float16", "float64"}; }
template <> inline std::vector<std::string> names_of<NoiseForm>() {
  return {"none",
          "gaussian_additive",
          "gaussian_multiplicative",
          "uniform_additive",
          "uniform_multiplicative",
          "bernoulli_multiplicative"};
}
template <> inline std::vector<std::string> names_of<Topology>() { return {"none", "top2", "pairs"}; }

template <class E> E named(const std::string& given) {
  const auto names = names_of<E>();
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == given) return E(i);
  throw std::invalid_argument("there is no '" + given + "' among " + names.front() + " to " + names.back());
}

template <class T> T from_python(py::handle given) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(given.cast<Address>());
  } else if constexpr (std::is_enum_v<T>) {
    return named<T>(given.cast<std::string>());
  } else {
    return given.cast<T>();
  }
}

// The Python class of a params struct and the functions of the module that take it.
template <class P>
class Fields {
 public:
  using Setter = std::function<void(Bound<P>&, py::handle)>;
  using Setters = std::unordered_map<std::string, Setter>;

  // `start` prepares a new struct, `finish` derives and checks what depends on several fields.
  Fields(py::module_& m, const char* name, void (*start)(P&) = nullptr, void (*finish)(P&) = nullptr) : module_(m) {
    const auto fill = [name = std::string(name), setters = setters_](Bound<P>& bound, const py::kwargs& given) {
      for (const auto& [key, value] : given) {
        const auto found = setters->find(key.template cast<std::string>());
        if (found == setters->end())
          throw py::type_error(name + " has no field '" + key.template cast<std::string>() + "'");
        found->second(bound, value);
      }
    };
    py::class_<Bound<P>>(m, name, py::module_local())
        .def(py::init([fill, start, finish](const py::kwargs& given) {
          auto bound = std::make_unique<Bound<P>>();
          if (start) start(bound->params);
          fill(*bound, given);
          if (finish) finish(bound->params);
          return bound;
        }))
        .def("set", fill, "Sets more fields: a workspace, whose size follows from the others.");
  }

  // A field that takes more than a conversion.
  Fields& on(const char* name, Setter set) {
    setters_->emplace(name, std::move(set));
    return *this;
  }

  // A number, a flag, an enum, or the address that a pointer gets.
  template <class T> Fields& field(const char* name, T P::*member) {
    return on(name, [member](Bound<P>& bound, py::handle given) { bound.params.*member = from_python<T>(given); });
  }

  // Numbers or addresses that the struct points to; null where the list is empty.
  template <class T> Fields& list(const char* name, T* P::*member) {
    return on(name, [member](Bound<P>& bound, py::handle given) {
      using Item = std::remove_const_t<T>;
      const auto items = std::make_shared<std::vector<Item>>();
      for (const py::handle item : py::reinterpret_borrow<py::sequence>(given))
        items->push_back(from_python<Item>(item));
      bound.params.*member = items->empty() ? nullptr : items->data();
      bound.alive.push_back(items);
    });
  }

  // Addresses that lie in the struct itself. Beyond its end there is other memory, so their number is checked; all
  // lists that share a `count` are of one length, which is that of the first.
  template <class T, size_t N> Fields& array(const char* name, T (P::*member)[N], int32_t P::*count = nullptr) {
    return on(name, [=](Bound<P>& bound, py::handle given) {
      const auto items = py::reinterpret_borrow<py::sequence>(given);
      const size_t size = items.size();
      if (size > N || (count && size == 0))
        throw std::invalid_argument(text(size) + " terms; 1 to " + text(N) + " are allowed");
      if (count) {
        int32_t& terms = bound.params.*count;
        if (terms && terms != int32_t(size))
          throw std::invalid_argument(std::string(name) + " has " + text(size) + " of " + text(terms) + " terms");
        terms = int32_t(size);
      }
      for (size_t i = 0; i < size; ++i) (bound.params.*member)[i] = from_python<T>(items[i]);
    });
  }

  // Defines module.name(params). The GIL is released while the kernel runs; the caller keeps the tensors alive.
  template <class Kernel> Fields& run(const char* name, Kernel kernel) {
    module_.def(name, [kernel](const Bound<P>& bound) {
      py::gil_scoped_release unlocked;
      return kernel(bound.params);
    });
    return *this;
  }

 private:
  py::module_& module_;
  std::shared_ptr<Setters> setters_ = std::make_shared<Setters>();
};

}  // namespace fastnas
