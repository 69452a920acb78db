#include "engines.hpp"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "glip/glip.hpp"
#include "sha256.hpp"

namespace glip {
namespace {

namespace fs = std::filesystem;

constexpr int kRecordVersion = 1;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::missing, message); }

void check_profile(const Profile& profile, const std::string& name, std::size_t rank) {
  const auto found = profile.find(name);
  const bool legal =
      found != profile.end() && std::all_of(found->second.begin(), found->second.end(), [&](const Shape& shape) {
        return shape.size() == rank && std::all_of(shape.begin(), shape.end(), [](auto side) { return side > 0; });
      });
  if (!legal) throw std::invalid_argument("a profile lacks shapes of " + name);
}

/// What the backend asks profiles for.
void check_profiles(const std::string& file, const std::vector<Profile>& profiles) {
  static const std::map<std::string, std::map<std::string, std::size_t>> kInputs = {
      {"text.plan", {{"input_ids", 2}}},
      {"image.plan", {{"frames", 4}, {"text_mask", 2}, {"class_map", 3}}},
      {"backbone.plan", {{"frames", 4}}},
      {"head.plan", {{"text_mask", 2}, {"class_map", 3}}},
  };
  const auto inputs = kInputs.find(file);
  if (inputs == kInputs.end()) return;
  if (profiles.empty()) throw std::invalid_argument(file + " has no profile");
  for (const Profile& profile : profiles) {
    for (const auto& [name, rank] : inputs->second) check_profile(profile, name, rank);
  }
}

std::string text_of(const nlohmann::json& content, const char* key) { return content.at(key).get<std::string>(); }

EngineRecord parsed(const nlohmann::json& content, const std::string& file, const std::string& folder) {
  if (!content.is_object() || content.value("format", "") != "glip-deploy engines") {
    throw std::invalid_argument("\"format\" is not \"glip-deploy engines\"");
  }
  const int format = content.at("format_version").get<int>();
  if (format < 1) throw std::invalid_argument("format_version is " + std::to_string(format));
  if (format > kRecordVersion) {
    refuse(file + " has format " + std::to_string(format) + ", this library reads up to " + std::to_string(kRecordVersion) +
           "; upgrade it");
  }
  EngineRecord out;
  out.folder = folder;
  out.flavor = text_of(content, "flavour");
  out.version = text_of(content, "version");
  out.compute_capability = content.at("compute_capability").get<int>();
  out.of_gpu = !content.at("gpu").is_null();
  if (out.of_gpu) out.gpu = text_of(content, "gpu");
  if (!content.at("plugin").is_null()) {
    out.plugin = text_of(content.at("plugin"), "file");
    out.plugin_sha256 = text_of(content.at("plugin"), "sha256");
  }
  out.manifest_sha256 = text_of(content, "manifest_sha256");
  out.options = text_of(content, "options");
  for (const auto& [name, entry] : content.at("engines").items()) {
    EngineFile& engine = out.engines[name];
    engine.sha256 = text_of(entry, "sha256");
    engine.bytes = entry.at("bytes").get<std::uintmax_t>();
    for (const auto& of_profile : entry.at("profiles")) {
      Profile profile;
      for (const auto& [input, shapes] : of_profile.items()) profile[input] = shapes.get<std::array<Shape, 3>>();
      engine.profiles.push_back(std::move(profile));
    }
    check_profiles(name, engine.profiles);
  }
  for (const char* name : {"text.plan", "image.plan"}) {
    if (!out.engines.count(name)) throw std::invalid_argument(std::string("it does not list ") + name);
  }
  return out;
}

bool plain_name(const std::string& name) {
  return !name.empty() && fs::path(name).filename() == name && name != "." && name != "..";
}

std::vector<std::string> numbers_of(const std::string& version) {
  std::vector<std::string> out;
  std::istringstream stream(version);
  for (std::string part; std::getline(stream, part, '.');) out.push_back(part);
  return out;
}

/// Whether a library is of a recorded version. Some builds of Python's bindings leave out the last of its four numbers.
bool of_version(const std::string& recorded, const std::string& here) {
  const auto want = numbers_of(recorded), have = numbers_of(here);
  const std::size_t common = std::min(want.size(), have.size());
  return common >= 3 ? std::equal(want.begin(), want.begin() + static_cast<std::ptrdiff_t>(common), have.begin())
                     : recorded == here;
}

}  // namespace

EngineRecord EngineRecord::read(const std::string& folder) {
  const std::string file = folder + "/build.json", again = "delete " + folder + " and build again with glip-build";
  std::error_code ignored;
  if (!fs::is_regular_file(file, ignored)) {
    refuse(folder + " holds no engines (it has no build.json); build them with glip-build BUNDLE");
  }
  std::string json;
  try {
    json = read_file(file);
  } catch (const Error&) {
    refuse(file + " cannot be read; " + again);
  }
  try {
    return parsed(nlohmann::json::parse(json), file, folder);
  } catch (const nlohmann::json::exception& error) {
    refuse(file + " is damaged (" + std::string(error.what()).substr(0, 120) + "); " + again);
  } catch (const std::invalid_argument& error) {
    refuse(file + " is damaged (" + std::string(error.what()).substr(0, 120) + "); " + again);
  }
}

void EngineRecord::check(const Bundle& bundle, const std::string& here, const Gpu& device) const {
  const std::string engines_of = "engines " + folder + " were built ";
  std::string again = "; build again: glip-build " + bundle.path + " --flavor " + flavor;
  again += (options.empty() ? "" : " " + options) + " --overwrite";
  if (!of_version(version, here)) refuse(engines_of + "by " + flavor + " " + version + ", here is " + here + again);
  if (compute_capability != device.compute_capability) {
    refuse(engines_of + "for SM" + std::to_string(compute_capability) + ", here is " + device.name + " (SM" +
           std::to_string(device.compute_capability) + ")" + again);
  }
  // The full TensorRT chooses kernels by timing them on the very GPU; tensorrt-rtx finishes them on the target.
  if (flavor == "tensorrt" && of_gpu && gpu != device.name) {
    refuse(engines_of + "on " + gpu + ", here is " + device.name + again);
  }
  if (sha256_of_file(bundle.file("manifest.json")) != manifest_sha256) {
    refuse(engines_of + "from another export than " + bundle.path + again);
  }
  std::error_code ignored;
  if (!plugin.empty()) {
    if (!plain_name(plugin) || !fs::is_regular_file(file(plugin), ignored)) {
      refuse("engines " + folder + " lack their plugin library " + plugin + again);
    }
    if (sha256_of_file(file(plugin)) != plugin_sha256) {
      refuse("plugin library " + file(plugin) + " is not the one these engines were built with" + again);
    }
  }
  for (const auto& [name, engine] : engines) {
    if (!plain_name(name) || !fs::is_regular_file(file(name), ignored)) {
      refuse("engines " + folder + " lack " + name + again);
    }
    if (fs::file_size(file(name), ignored) != engine.bytes || sha256_of_file(file(name)) != engine.sha256) {
      refuse(file(name) + " was changed or cut short after its build" + again);
    }
  }
}

std::vector<std::string> find_engines(const std::string& bundle) {
  std::vector<std::string> out;
  std::error_code error;
  for (fs::directory_iterator entry(bundle + "/engines", error), end; !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    const bool complete = fs::is_regular_file(entry->path() / "build.json", ignored);
    if (complete && entry->path().filename().string()[0] != '.') out.push_back(entry->path().string());
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<std::string> candidate_engines(const Bundle& bundle, const std::string& folder) {
  if (!folder.empty()) {
    std::error_code ignored;
    const std::string inside = bundle.file("engines/" + folder);
    return {!fs::is_directory(folder, ignored) && fs::is_directory(inside, ignored) ? inside : folder};
  }
  std::vector<std::string> out = find_engines(bundle.path);
  if (out.empty()) refuse("bundle " + bundle.path + " has no engines; build them with glip-build " + bundle.path);
  return out;
}

EngineRecord choose_engines(const Bundle& bundle, const std::vector<std::string>& folders, bool plugins, const Gpu& gpu,
                            const LibraryVersion& version) {
  std::optional<Error> refused;
  for (const std::string& candidate : folders) {
    try {
      EngineRecord record = EngineRecord::read(candidate);
      if (!record.plugin.empty() && !plugins) {
        refuse("engines " + candidate + " need the plugin library " + record.plugin +
               ", and plugins are refused; build engines without one: glip-build " + bundle.path + " --flavor " +
               record.flavor + " --form native");
      }
      record.check(bundle, version(record), gpu);
      return record;
    } catch (const Error& error) {
      refused.emplace(error);
    }
  }
  if (refused) throw Error(*refused);
  refuse("there are no engines to choose from");
}

}  // namespace glip
