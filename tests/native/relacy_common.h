// What the models share: how a mutation is named, how a model is run and what is printed.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include <relacy/relacy.hpp>

inline const char* mutation = "none";

// Is this rule left out?
inline bool without(const char* rule) {
  return std::strcmp(mutation, rule) == 0;
}

inline bool reached(unsigned value, unsigned target) {
  return static_cast<int>(value - target) >= 0;
}

template <typename Suite>
bool holds(unsigned iterations) {
  rl::test_params params;
  params.iteration_count = iterations;
  params.execution_depth_limit = 20000;
  std::ostream quiet(nullptr);  // a string stream would mix Relacy's allocator with that of libstdc++
  params.output_stream = &quiet;
  params.progress_stream = &quiet;
  const bool ok = rl::simulate<Suite>(params);
  std::printf("%s\n", rl::test_result_str(params.test_result));
  return ok;
}

struct Model {
  const char* name;
  bool (*holds)(unsigned iterations);
};

// usage: PROGRAM MODEL MUTATION ITERATIONS; exit code 0: no fault found, 1: one was, 2: unknown model or mutation
inline int run_model(int argc, char** argv, std::initializer_list<Model> models,
                     std::initializer_list<const char*> rules) {
  if (argc != 4) return 2;
  for (const char* rule : rules) {
    if (std::strcmp(argv[2], rule) == 0) mutation = rule;
  }
  if (std::strcmp(argv[2], mutation) != 0) return 2;
  for (const Model& model : models) {
    if (std::strcmp(argv[1], model.name) == 0) return model.holds(static_cast<unsigned>(std::atoi(argv[3]))) ? 0 : 1;
  }
  return 2;
}
