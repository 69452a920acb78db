#include "bundle.hpp"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "glip/glip.hpp"
#include "sha256.hpp"

namespace glip {
namespace {

namespace fs = std::filesystem;

constexpr int kFormatVersion = 1;
const char* const kAgain = "export the bundle again with glip-export";

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::bundle, message); }

/// The state of a file; that of none is like no other.
FileState state_of(const std::string& file) {
  struct stat found {};
  if (::stat(file.c_str(), &found) != 0) return {};
  return {found.st_dev, found.st_ino, static_cast<std::uint64_t>(found.st_size), found.st_mtim.tv_sec, found.st_mtim.tv_nsec};
}

}  // namespace

FileSizes parse_manifest(const std::string& json, const std::string& file, Bundle& bundle) {
  FileSizes sizes;
  try {
    const auto content = nlohmann::json::parse(json);
    if (content.at("format") != "glip-deploy bundle") refuse(file + " is not that of a bundle; " + kAgain);
    const int version = content.at("format_version").get<int>();
    if (version < 1) refuse(file + " is damaged (format_version is " + std::to_string(version) + "); " + kAgain);
    if (version > kFormatVersion) {
      refuse(file + " has format " + std::to_string(version) + ", this library reads up to " + std::to_string(kFormatVersion) +
             "; upgrade it");
    }
    for (const auto& [name, record] : content.at("files").items()) {
      bundle.hashes[name] = record.at("sha256").get<std::string>();
      sizes[name] = record.at("bytes").get<std::uintmax_t>();
    }
    const auto& graphs = content.at("io");
    bundle.split = graphs.contains("backbone") && graphs.contains("head") && bundle.hashes.count("backbone.onnx") &&
                   bundle.hashes.count("head.onnx");
    const auto& config = content.at("config");
    bundle.nms_iou = config.at("head").at("nms_iou").get<double>();
    bundle.max_detections = config.at("head").at("max_detections").get<std::size_t>();
    bundle.max_tokens = config.at("input").at("max_tokens").get<std::size_t>();
    bundle.width = config.at("bert").at("hidden").get<std::size_t>();
    if (!(bundle.nms_iou >= 0 && bundle.nms_iou <= 1) || bundle.max_detections < 1 || bundle.max_tokens < 1) {
      refuse(file + " is damaged (a number is out of its range); " + kAgain);
    }
  } catch (const nlohmann::json::exception& error) {
    refuse(file + " is damaged (" + std::string(error.what()).substr(0, 120) + "); " + kAgain);
  }
  return sizes;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (!file || !(content << file.rdbuf())) refuse(path + " cannot be read (" + std::strerror(errno) + "); " + kAgain);
  return content.str();
}

Bundle Bundle::open(const std::string& path, bool verify) {
  Bundle bundle;
  bundle.path = path;
  bundle.verified = verify;
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    refuse("bundle " + path + (fs::exists(path, ignored) ? " is a file, not a bundle directory" : " does not exist") +
           "; make a bundle with glip-export --model glip_t.pth --output DIR");
  }
  if (!fs::is_regular_file(bundle.file("manifest.json"), ignored)) {
    refuse(path + " is not a bundle: it has no manifest.json; make one with glip-export --output " + path);
  }
  const std::string manifest = bundle.file("manifest.json");
  const FileSizes sizes = parse_manifest(read_file(manifest), manifest, bundle);
  for (const char* name : {"tokenizer.json", "text.onnx", "image.onnx"}) {
    if (!bundle.hashes.count(name)) refuse(bundle.file("manifest.json") + " does not list " + name + "; " + kAgain);
  }
  std::string identity = std::to_string(kFormatVersion);
  for (const auto& [name, hash] : bundle.hashes) {
    const fs::path relative(name);
    bool outside = relative.is_absolute();
    for (const auto& part : relative) outside = outside || part == "..";
    if (outside) refuse(bundle.file("manifest.json") + " lists '" + name + "', a file outside the bundle; " + kAgain);
    const std::string file = bundle.file(name);
    const FileState& state = bundle.states[name] = state_of(file);
    if (!fs::is_regular_file(file, ignored))
      refuse("bundle " + path + " lacks " + name + "; copy the whole directory, or " + kAgain);
    if (state.size != sizes.at(name)) {
      refuse(file + " has " + std::to_string(state.size) + " bytes, the manifest says " + std::to_string(sizes.at(name)) +
             "; " + kAgain);
    }
    if (verify && sha256_of_file(file) != hash) {
      refuse(file + " was changed after the export (its SHA-256 differs); " + kAgain);
    }
    if (name == "tokenizer.json" || name.rfind("text.", 0) == 0) identity += "\n" + name + " " + hash;
  }
  if (verify) bundle.key = sha256_hex(identity);
  return bundle;
}

void Bundle::check_unchanged() const {
  for (const auto& [name, state] : states) {
    if (!(state_of(file(name)) == state)) {
      refuse("bundle " + path + " was changed, removed or replaced since it was opened (" + name + "); open it again");
    }
  }
}

Tokenizer Bundle::tokenizer() const {
  const std::string name = file("tokenizer.json");
  Tokenizer read = Tokenizer::parse(read_file(name), name);
  check_unchanged();
  return read;
}

}  // namespace glip
