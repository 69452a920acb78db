// A libnvinfer, or with GLIP_RTX a libtensorrt_rtx, whose engines are computed by functions that the test gives: real objects
// of TensorRT's classes, as its headers lay them out, over tables of functions that hold those which the runtime calls; any
// other ends the process.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../src/trt_interface.hpp"
#include "simulated_cuda.hpp"

namespace {

constexpr std::size_t kSides = 8, kMemory = 1000;  // of a shape; bytes that contexts compute in

/// What the test computes. Engines are numbers; shapes have kSides numbers each, of which `ranks` says how many count.
struct Callbacks {
  /// The engine of a plan: its number on the first line, then "in NAME TYPE" or "out NAME TYPE"; null to refuse it.
  const char* (*describe)(const char* plan, std::size_t size);
  int (*accepts)(int engine, int profile, const char* name, const std::int64_t* shape, int rank);
  /// Fill in the shapes of outputs; the return value of inferShapes.
  int (*infer)(int engine, const char* const* names, std::int64_t* shapes, int* ranks, int count);
  int (*run)(int engine, const char* const* names, void* const* addresses, const std::int64_t* shapes, const int* ranks,
             int count);
  int (*load_plugin)(const char* path);
};
Callbacks callbacks{};
std::int32_t version = NV_TENSORRT_VERSION;
bool plugin_known = false;
int engines = 0, contexts = 0, settings = 0;
#ifdef GLIP_RTX
std::string driver = "driver 1\n";  // that a cache begins with: another driver refuses it
int compiled = 0;                   // kernels, of shapes that no cache knew

bool counts_memory_in_64_bits() { return true; }
#else
bool counts_memory_in_64_bits() { return version >= 100100; }
#endif
std::set<std::string> refused;  // what a test makes fail
nvinfer1::ILogger* logger = nullptr;

bool fails(const char* what) {
  if (!refused.count(what)) return false;
  logger->log(nvinfer1::ILogger::Severity::kERROR, (std::string("the simulation refuses\n") + what).c_str());
  logger->log(nvinfer1::ILogger::Severity::kWARNING, "nobody reads this");
  return true;
}

[[noreturn]] void unexpected() {
  std::fputs("the simulated TensorRT was asked for something that it does not have\n", stderr);
  std::abort();
}

/// An object whose class is a table of functions (Itanium C++ ABI), each of which takes the object first.
class Object {
 public:
  explicit Object(void* owner) : owner_(owner) {
    functions_.fill(reinterpret_cast<void*>(&unexpected));
    table_ = functions_.data();
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  /// Put a function in the place of a virtual one.
  template <typename Method, typename Function>
  void set(Method method, Function function) {
    std::ptrdiff_t place = 0;
    static_assert(sizeof method >= sizeof place);
    std::memcpy(&place, &method, sizeof place);
#if !defined(__aarch64__)
    place -= 1;
#endif
    functions_.at(static_cast<std::size_t>(place) / sizeof(void*)) = reinterpret_cast<void*>(function);
  }

  template <typename Interface>
  Interface* as() {
    return reinterpret_cast<Interface*>(this);
  }
  template <typename Owner>
  static Owner& owner(void* self) {
    return *static_cast<Owner*>(static_cast<Object*>(self)->owner_);
  }

 private:
  void* table_ = nullptr;  // where an object has the pointer to its table: first
  void* owner_;
  std::array<void*, 192> functions_;
};

struct Tensor {
  std::string name;
  bool input;
  int type;
};

class Engine : public nvinfer1::ICudaEngine {
 public:
  explicit Engine(const std::string& described);
  ~Engine() noexcept override { --engines; }

  const Tensor& tensor(const char* name) const {
    for (const Tensor& one : tensors) {
      if (one.name == name) return one;
    }
    unexpected();
  }

  int number = 0;
  std::vector<Tensor> tensors;

 private:
  Object object_{this};
};

#ifdef GLIP_RTX
/// A copy of what a cache has.
class Memory : public nvinfer1::IHostMemory {
 public:
  explicit Memory(std::string content) : content_(std::move(content)) {
    ++settings;
    using V = nvinfer1::apiv::VHostMemory;
    mImpl = object_.as<V>();
    object_.set(
        &V::data, +[](void* self) -> void* { return Object::owner<Memory>(self).content_.data(); });
    object_.set(
        &V::size, +[](void* self) { return Object::owner<Memory>(self).content_.size(); });
  }
  ~Memory() noexcept override { --settings; }

 private:
  std::string content_;
  Object object_{this};
};

class Cache : public nvinfer1::IRuntimeCache {
 public:
  Cache() {
    ++settings;
    using V = nvinfer1::apiv::VRuntimeCache;
    mImpl = object_.as<V>();
    object_.set(
        &V::serialize, +[](void* self) -> nvinfer1::IHostMemory* {
          std::string content = driver;
          for (const std::string& kernel : Object::owner<Cache>(self).kernels) content += kernel + "\n";
          return new Memory(content);
        });
    object_.set(
        &V::deserialize, +[](void* self, const void* given, std::size_t size) {
          const std::string content(static_cast<const char*>(given), size);
          if (content.compare(0, driver.size(), driver) != 0) return false;
          std::istringstream lines(content.substr(driver.size()));
          for (std::string line; std::getline(lines, line);) Object::owner<Cache>(self).kernels.insert(line);
          return true;
        });
  }
  ~Cache() noexcept override { --settings; }

  std::set<std::string> kernels;

 private:
  Object object_{this};
};

class Settings : public nvinfer1::IRuntimeConfig {
 public:
  Settings() {
    ++settings;
    using V = nvinfer1::apiv::VRuntimeConfig;
    mImpl = object_.as<V>();
    object_.set(
        &V::setExecutionContextAllocationStrategy, +[](void* self, nvinfer1::ExecutionContextAllocationStrategy strategy) {
          Object::owner<Settings>(self).lends = strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
        });
    object_.set(
        &V::setDynamicShapesKernelSpecializationStrategy,
        +[](void* self, nvinfer1::DynamicShapesKernelSpecializationStrategy strategy) {
          Object::owner<Settings>(self).waits = strategy == nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER;
        });
    object_.set(
        &V::createRuntimeCache, +[](void*) -> nvinfer1::IRuntimeCache* { return fails("cache") ? nullptr : new Cache; });
    object_.set(
        &V::setRuntimeCache, +[](void* self, const nvinfer1::IRuntimeCache& given) {
          Object::owner<Settings>(self).cache = &const_cast<Cache&>(static_cast<const Cache&>(given));
          return true;
        });
  }
  ~Settings() noexcept override { --settings; }

  bool lends = false, waits = false;
  Cache* cache = nullptr;

 private:
  Object object_{this};
};
#endif

class Context : public nvinfer1::IExecutionContext {
 public:
  explicit Context(const Engine& of);
  ~Context() noexcept override { --contexts; }

  /// By tensor, in the engine's order.
  struct Arrays {
    std::vector<const char*> names;
    std::vector<std::int64_t> shapes;
    std::vector<int> ranks;
    std::vector<void*> addresses;
  };
  Arrays arrays() const {
    Arrays out;
    for (const Tensor& one : engine.tensors) {
      const auto shape = shapes.find(one.name);
      const auto address = addresses.find(one.name);
      out.names.push_back(one.name.c_str());
      out.ranks.push_back(shape == shapes.end() ? 0 : shape->second.nbDims);
      out.addresses.push_back(address == addresses.end() ? nullptr : address->second);
      for (std::size_t i = 0; i < kSides; ++i) out.shapes.push_back(shape == shapes.end() ? 0 : shape->second.d[i]);
    }
    return out;
  }

  const Engine& engine;
  int profile = 0;
  void* memory = nullptr;
  std::map<std::string, nvinfer1::Dims> shapes;
  std::map<std::string, void*> addresses;
#ifdef GLIP_RTX
  /// Compile kernels for the shapes that are set, unless they are known.
  void compile() const {
    std::string kernel;
    for (const auto& [name, dims] : shapes) {
      kernel += name;
      for (int i = 0; i < dims.nbDims; ++i) kernel += " " + std::to_string(dims.d[i]);
      kernel += ", ";
    }
    if (!cache || cache->kernels.insert(kernel).second) ++compiled;
  }
  Cache* cache = nullptr;
#endif

 private:
  Object object_{this};
};

Engine& engine_of(void* self) { return Object::owner<Engine>(self); }
Context& context_of(void* self) { return Object::owner<Context>(self); }
#ifndef GLIP_RTX
nvinfer1::IExecutionContext* make_context(void* self) { return fails("context") ? nullptr : new Context(engine_of(self)); }
#endif

/// Put in its place what headers of TensorRT-RTX before 1.5 lack.
template <typename V>
auto set_capturable(Object& object, int) -> decltype(&V::isStreamCapturable, void()) {
  object.set(
      &V::isStreamCapturable, +[](void*, cudaStream_t) { return !fails("capture"); });
}
template <typename V>
void set_capturable(Object&, long) {}

Engine::Engine(const std::string& described) {
  ++engines;
  std::istringstream lines(described);
  lines >> number;
  std::string mode;
  for (Tensor one; lines >> mode >> one.name >> one.type;) {
    one.input = mode == "in";
    tensors.push_back(one);
  }
  using V = nvinfer1::apiv::VCudaEngine;
  mImpl = object_.as<V>();
  object_.set(
      &V::getNbIOTensors, +[](void* self) { return static_cast<std::int32_t>(engine_of(self).tensors.size()); });
  object_.set(
      &V::getIOTensorName,
      +[](void* self, std::int32_t index) { return engine_of(self).tensors.at(static_cast<std::size_t>(index)).name.c_str(); });
  object_.set(
      &V::getTensorIOMode, +[](void* self, const char* name) {
        return engine_of(self).tensor(name).input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
      });
  object_.set(
      &V::getTensorDataType,
      +[](void* self, const char* name) { return static_cast<nvinfer1::DataType>(engine_of(self).tensor(name).type); });
#ifdef GLIP_RTX
  object_.set(
      &V::createRuntimeConfig, +[](void*) -> nvinfer1::IRuntimeConfig* { return fails("settings") ? nullptr : new Settings; });
  object_.set(
      &V::createExecutionContextWithRuntimeConfig,
      +[](void* self, nvinfer1::IRuntimeConfig* given) -> nvinfer1::IExecutionContext* {
        const Settings& chosen = static_cast<const Settings&>(*given);
        if (!chosen.lends || !chosen.waits) unexpected();
        if (fails("context")) return nullptr;
        auto* const made = new Context(engine_of(self));
        made->cache = chosen.cache;
        return made;
      });
#elif GLIP_INTERFACE < 1000
  object_.set(&V::createExecutionContextWithoutDeviceMemory, &make_context);
#else
  object_.set(
      &V::createExecutionContext, +[](void* self, nvinfer1::ExecutionContextAllocationStrategy strategy) {
        if (strategy != nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED) unexpected();
        return make_context(self);
      });
#endif
#if GLIP_INTERFACE < 1100 && !defined(GLIP_RTX)
  if (!counts_memory_in_64_bits())
    object_.set(
        &V::getDeviceMemorySize, +[](void*) { return kMemory; });
#endif
#if GLIP_INTERFACE >= 1001
  if (counts_memory_in_64_bits())
    object_.set(
        &V::getDeviceMemorySizeV2, +[](void*) { return static_cast<std::int64_t>(kMemory); });
#endif
}

Context::Context(const Engine& of) : engine(of) {
  ++contexts;
  using V = nvinfer1::apiv::VExecutionContext;
  mImpl = object_.as<V>();
#if GLIP_INTERFACE < 1100 && !defined(GLIP_RTX)
  if (!counts_memory_in_64_bits())
    object_.set(
        &V::setDeviceMemory, +[](void* self, void* given) { context_of(self).memory = given; });
#endif
#if GLIP_INTERFACE >= 1001
  if (counts_memory_in_64_bits()) {
    object_.set(
        &V::setDeviceMemoryV2, +[](void* self, void* given, std::int64_t size) {
          context_of(self).memory = size == static_cast<std::int64_t>(kMemory) ? given : nullptr;
        });
  }
#endif
  set_capturable<V>(object_, 0);
  object_.set(
      &V::setOptimizationProfileAsync, +[](void* self, std::int32_t index, cudaStream_t) {
        context_of(self).profile = index;
        return !fails("profile");
      });
  object_.set(
      &V::setInputShape, +[](void* self, const char* name, const nvinfer1::Dims& dims) {
        Context& context = context_of(self);
        std::array<std::int64_t, kSides> shape{};
        for (int i = 0; i < dims.nbDims; ++i) shape[static_cast<std::size_t>(i)] = dims.d[i];
        if (fails("shape") || !callbacks.accepts(context.engine.number, context.profile, name, shape.data(), dims.nbDims))
          return false;
        context.shapes[name] = dims;
        return true;
      });
  object_.set(
      &V::inferShapes, +[](void* self, std::int32_t count, const char** names) {
        Context& context = context_of(self);
        if (fails("infer")) {
          if (count > 0) names[0] = context.engine.tensors[0].name.c_str();
          return std::int32_t{1};
        }
        auto arrays = context.arrays();
        const int size = static_cast<int>(arrays.names.size());
        const int unknown =
            callbacks.infer(context.engine.number, arrays.names.data(), arrays.shapes.data(), arrays.ranks.data(), size);
        for (std::size_t i = 0; i < arrays.names.size(); ++i) {
          nvinfer1::Dims dims{};
          dims.nbDims = arrays.ranks[i];
          for (std::size_t side = 0; side < kSides; ++side) {
            dims.d[side] = static_cast<std::decay_t<decltype(dims.d[0])>>(arrays.shapes[i * kSides + side]);
          }
          context.shapes[arrays.names[i]] = dims;
        }
        return static_cast<std::int32_t>(unknown);
      });
  object_.set(
      &V::getTensorShape, +[](void* self, const char* name) { return context_of(self).shapes.at(name); });
  object_.set(
      &V::setTensorAddress, +[](void* self, const char* name, void* address) {
        context_of(self).addresses[name] = address;
        return !fails("address") && simulated_is_device(address, 1);
      });
  object_.set(
      &V::enqueueV3, +[](void* self, cudaStream_t stream) {
        Context& context = context_of(self);
        if (fails("enqueue") || !simulated_is_device(context.memory, kMemory)) return false;
        const auto work = [&context] {
          auto arrays = context.arrays();
          const int size = static_cast<int>(arrays.names.size());
          return callbacks.run(context.engine.number, arrays.names.data(), arrays.addresses.data(), arrays.shapes.data(),
                               arrays.ranks.data(), size) != 0;
        };
#ifdef GLIP_RTX
        context.compile();
#endif
        return simulated_enqueue("execute", stream, work) == CUDA_SUCCESS;
      });
}

class Runtime : public nvinfer1::IRuntime {
 public:
  Runtime() {
    using V = nvinfer1::apiv::VRuntime;
    mImpl = object_.as<V>();
    const auto load = +[](const void* plan, std::size_t size) -> nvinfer1::ICudaEngine* {
      const char* const described = fails("plan") ? nullptr : callbacks.describe(static_cast<const char*>(plan), size);
      return described ? new Engine(described) : nullptr;
    };
    static const auto kLoad = load;
#if GLIP_INTERFACE < 1000
    using Method = nvinfer1::ICudaEngine* (V::*)(const void*, std::size_t, nvinfer1::IPluginFactory*) noexcept;
    const auto entry = +[](void*, const void* plan, std::size_t size, nvinfer1::IPluginFactory*) { return kLoad(plan, size); };
#else
    using Method = nvinfer1::ICudaEngine* (V::*)(const void*, std::size_t) noexcept;
    const auto entry = +[](void*, const void* plan, std::size_t size) { return kLoad(plan, size); };
#endif
    object_.set(static_cast<Method>(&V::deserializeCudaEngine), entry);
  }

 private:
  Object object_{this};
};

Object& the_registry() {
  static Object registry(nullptr);
  using V = nvinfer1::IPluginRegistry;
  const auto find = +[](void*, const char* name, const char* plugin_version, const char* space) -> void* {
    const std::string wanted = std::string(name) + " " + plugin_version + " " + space;
    return plugin_known && wanted == "ModulatedDeformConv 3 glip" ? &plugin_known : nullptr;
  };
#if GLIP_INTERFACE < 1000
  registry.set(&V::getPluginCreator, find);
#else
  using Method = nvinfer1::IPluginCreatorInterface* (V::*)(const char*, const char*, const char*) noexcept;
  registry.set(static_cast<Method>(&V::getCreator), find);
#endif
  registry.set(
      &V::loadLibrary, +[](void*, const char* path) -> void* {
        plugin_known = callbacks.load_plugin(path) != 0;
        return plugin_known ? &plugin_known : nullptr;
      });
  return registry;
}

}  // namespace

#define SHOWN extern "C" __attribute__((visibility("default")))

SHOWN std::int32_t getInferLibVersion() noexcept { return version; }
#if GLIP_INTERFACE >= 1000
SHOWN std::int32_t getInferLibBuildVersion() noexcept { return 34; }
#endif
SHOWN nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return the_registry().as<nvinfer1::IPluginRegistry>(); }

SHOWN void* createInferRuntime_INTERNAL(void* given, std::int32_t asked) noexcept {
  logger = static_cast<nvinfer1::ILogger*>(given);
  if (asked != version || fails("runtime")) return nullptr;
  return static_cast<nvinfer1::IRuntime*>(new (std::nothrow) Runtime);
}

SHOWN void simulated_tensorrt(const Callbacks* given, std::int32_t number) {
  callbacks = *given;
  version = number;
}
SHOWN void simulated_refuse(const char* what, int yes) {
  if (yes) {
    refused.insert(what);
  } else {
    refused.erase(what);
  }
}
SHOWN void simulated_forget_plugin() { plugin_known = false; }
SHOWN int simulated_engines() { return engines; }
SHOWN int simulated_contexts() { return contexts; }
SHOWN int simulated_settings() { return settings; }
#ifdef GLIP_RTX
SHOWN int simulated_compiled() { return compiled; }
SHOWN void simulated_driver_number(int number) { driver = "driver " + std::to_string(number) + "\n"; }
#endif
