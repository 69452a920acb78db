#include "cache.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <tuple>

#include "sha256.hpp"

namespace glip {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kInMemory = 64, kDigest = 32;
constexpr std::uintmax_t kPromptBytes = 256u << 20, kCompiledBytes = 4ull << 30;
const char kMagic[] = "GLIPOVC1";

std::optional<std::string> read_whole(const fs::path& file, std::uintmax_t limit) {
  std::error_code failed;
  const auto size = fs::file_size(file, failed);
  if (failed || size > limit) return std::nullopt;
  std::ifstream stream(file, std::ios::binary);
  std::string content(static_cast<std::size_t>(size), '\0');
  if (!stream.read(content.data(), static_cast<std::streamsize>(size))) return std::nullopt;
  return content;
}

/// Mark as used, or remove what is damaged.
void after_reading(const fs::path& file, bool whole) {
  std::error_code ignored;
  if (whole) {
    fs::last_write_time(file, fs::file_time_type::clock::now(), ignored);
  } else {
    fs::remove(file, ignored);
  }
}

/// Write under another name and rename: a reader sees all of it or nothing.
void write_whole(const fs::path& file, const std::string& content) {
  static std::atomic<unsigned> number{0};
  std::error_code failed;
  fs::create_directories(file.parent_path(), failed);
  const fs::path partial =
      file.parent_path() / ("." + file.filename().string().substr(0, 32) + "." + std::to_string(::getpid()) + "-" +
                            std::to_string(number++) + ".part" + file.extension().string());
  {
    std::ofstream stream(partial, std::ios::binary);
    stream.write(content.data(), static_cast<std::streamsize>(content.size()));
    stream.close();
    if (!stream) {
      fs::remove(partial, failed);
      return;
    }
  }
  fs::rename(partial, file, failed);
  if (failed) fs::remove(partial, failed);
}

/// Remove the longest unused files of this extension beyond a limit.
void evict(const fs::path& root, const std::string& extension, std::uintmax_t limit) {
  std::vector<std::tuple<fs::file_time_type, std::uintmax_t, fs::path>> entries;
  std::uintmax_t total = 0;
  std::error_code failed;
  for (fs::recursive_directory_iterator entry(root, failed), end; !failed && entry != end; entry.increment(failed)) {
    std::error_code gone;  // another process may be evicting too
    const fs::path& file = entry->path();
    if (file.extension() != extension || file.filename().string().front() == '.') continue;
    const auto size = entry->file_size(gone);
    const auto time = entry->last_write_time(gone);
    if (gone) continue;
    entries.emplace_back(time, size, file);
    total += size;
  }
  std::sort(entries.begin(), entries.end());
  for (const auto& [time, size, file] : entries) {
    if (total <= limit) break;
    fs::remove(file, failed);
    total -= size;
  }
}

/// Whether nobody else could have put a file there.
bool is_private(const fs::path& folder) {
  struct stat found {};
  return ::stat(folder.c_str(), &found) == 0 && found.st_uid == ::geteuid() && (found.st_mode & S_IWOTH) == 0;
}

std::string npy_header(std::size_t rows, std::size_t width) {
  std::string text =
      "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " + std::to_string(width) + "), }";
  text.append((64 - (10 + text.size() + 1) % 64) % 64, ' ');
  text += '\n';
  std::string out = "\x93NUMPY";
  out += std::string("\x01\x00", 2);
  out += static_cast<char>(text.size() & 255);
  out += static_cast<char>(text.size() >> 8);
  return out + text;
}

std::string key_of(const std::vector<std::int64_t>& ids) {
  return sha256_hex(std::string(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(ids[0])));
}

}  // namespace

std::string cache_folder() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  const std::string home = variable("HOME");
  std::string chosen = variable("GLIP_DEPLOY_CACHE");
  if (!chosen.empty()) {
    if (chosen[0] != '~') return chosen;
    return home.empty() ? "" : home + chosen.substr(1);
  }
  chosen = variable("XDG_CACHE_HOME");
  if (!chosen.empty()) return chosen + "/glip-deploy";
  return home.empty() ? "" : home + "/.cache/glip-deploy";
}

PromptCache::PromptCache(std::string folder, std::string key) : folder_(std::move(folder)), key_(std::move(key)) {}

Embedding PromptCache::get(const std::vector<std::int64_t>& ids, std::size_t width) {
  const std::string key = key_of(ids);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = memory_.find(key);
    if (known != memory_.end()) {
      used_.splice(used_.end(), used_, std::find(used_.begin(), used_.end(), key));
      return known->second;
    }
  }
  if (folder_.empty()) return nullptr;
  const fs::path file = fs::path(folder_) / key_.substr(0, 16) / (key + ".embedding");
  const auto content = read_whole(file, kPromptBytes);
  if (!content) return nullptr;
  const std::string header = npy_header(ids.size(), width);
  const std::size_t bytes = ids.size() * width * sizeof(float);
  const bool whole = content->size() >= kDigest &&
                     content->substr(0, kDigest) == sha256_raw(key_ + " " + key + "\n" + content->substr(kDigest));
  after_reading(file, whole);
  if (!whole || content->size() != kDigest + header.size() + bytes || content->compare(kDigest, header.size(), header) != 0) {
    return nullptr;
  }
  std::vector<float> values(ids.size() * width);
  std::memcpy(values.data(), content->data() + kDigest + header.size(), bytes);
  auto embedding = std::make_shared<const std::vector<float>>(std::move(values));
  remember(key, embedding);
  return embedding;
}

void PromptCache::put(const std::vector<std::int64_t>& ids, std::size_t width, const Embedding& embedding) {
  const std::string key = key_of(ids);
  remember(key, embedding);
  if (folder_.empty()) return;
  std::string array = npy_header(ids.size(), width);
  array.append(reinterpret_cast<const char*>(embedding->data()), embedding->size() * sizeof(float));
  if (array.size() + kDigest > kPromptBytes) return;
  const fs::path root(folder_);
  write_whole(root / key_.substr(0, 16) / (key + ".embedding"), sha256_raw(key_ + " " + key + "\n" + array) + array);
  evict(root, ".embedding", kPromptBytes);
}

void PromptCache::remember(const std::string& key, Embedding embedding) {
  const std::lock_guard<std::mutex> lock(mutex_);
  used_.remove(key);
  used_.push_back(key);
  memory_[key] = std::move(embedding);
  while (used_.size() > kInMemory) {
    memory_.erase(used_.front());
    used_.pop_front();
  }
}

std::optional<std::string> read_compiled(const std::string& folder, const std::string& key) {
  if (folder.empty()) return std::nullopt;
  const fs::path file = fs::path(folder) / "openvino" / (key + ".compiled");
  auto content = read_whole(file, kCompiledBytes);
  if (!content) return std::nullopt;
  const std::size_t magic = sizeof(kMagic) - 1, header = magic + kDigest;
  bool whole = content->size() >= header && content->compare(0, magic, kMagic) == 0;
  if (whole) {
    const std::string digest = content->substr(magic, kDigest);
    content->erase(0, header);
    whole = sha256_raw(*content) == digest;
  }
  after_reading(file, whole);
  return whole ? content : std::nullopt;
}

void write_compiled(const std::string& folder, const std::string& key, const std::string& data) {
  if (folder.empty() || data.size() + sizeof(kMagic) + kDigest > kCompiledBytes) return;
  const fs::path root = fs::path(folder) / "openvino";
  write_whole(root / (key + ".compiled"), kMagic + sha256_raw(data) + data);
  evict(root, ".compiled", kCompiledBytes);
}

std::string kernels_key(const std::string& engine, const std::string& version, const std::string& gpu) {
  return sha256_hex(engine + " " + version + " " + gpu).substr(0, 32);
}

std::optional<std::string> read_kernels(const std::string& folder, const std::string& key) {
  const fs::path root = fs::path(folder) / "kernels";
  if (folder.empty() || !is_private(root)) return std::nullopt;
  return read_whole(root / (key + ".bin"), kCompiledBytes);
}

void write_kernels(const std::string& folder, const std::string& key, const std::string& data) {
  const fs::path root = fs::path(folder) / "kernels";
  if (folder.empty()) return;
  std::error_code ignored;
  fs::create_directories(folder, ignored);
  ::mkdir(root.c_str(), 0700);  // fails where it is there
  if (is_private(root)) write_whole(root / (key + ".bin"), data);
}

}  // namespace glip
