// The exported folder: its manifest, checked as glip_deploy/bundle does.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "tokenizer.hpp"

namespace glip {

/// What changes when a file is written, or replaced by another.
struct FileState {
  std::uint64_t device = 0, inode = 0, size = 0;
  std::int64_t modified_s = 0, modified_ns = 0;
  bool operator==(const FileState& other) const {
    return device == other.device && inode == other.inode && size == other.size && modified_s == other.modified_s &&
           modified_ns == other.modified_ns;
  }
};

struct Bundle {
  /// Open and check a bundle; throws Error(bundle).
  static Bundle open(const std::string& path, bool verify);

  Tokenizer tokenizer() const;
  std::string file(const std::string& name) const { return path + "/" + name; }

  /// Throw Error(bundle) if a file is not the one that was opened: whoever has read one asks, before what it read is used.
  /// Another bundle that had the name for an instant, and lost it again, is not noticed.
  void check_unchanged() const;

  std::string path;
  std::map<std::string, std::string> hashes;  ///< SHA-256 of every file, by name
  std::map<std::string, FileState> states;    ///< every file before it was hashed, by name
  std::string key;                            ///< identity of the text branch, as Python's `Bundle.key`; empty if unverified
  double nms_iou = 0.6;
  std::size_t max_detections = 100, max_tokens = 256, width = 0;  ///< width: of the text embedding
  bool verified = false;
  bool split = false;  ///< whether the image branch is there in two parts too, backbone.onnx and head.onnx
};

/// Bytes of each file, by name.
using FileSizes = std::map<std::string, std::uintmax_t>;

/// Fill a bundle with what its manifest says, and return the sizes of its files; throws Error(bundle) where it is none.
/// `file` is its name for messages.
FileSizes parse_manifest(const std::string& json, const std::string& file, Bundle& bundle);

/// The whole of a file; throws Error(bundle) where it cannot be read.
std::string read_file(const std::string& path);

}  // namespace glip
