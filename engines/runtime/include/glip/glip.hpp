/// Open-vocabulary detection with exported GLIP bundles, for C++17.
///
///     glip::Detector detector = glip::Detector::open("glip_t");
///     glip::Prompt prompt = detector.encode({"person", "traffic light"});
///     for (const glip::Detection& found : detector.detect({pixels, width, height, pitch}, prompt, 0.5f)) ...
///
/// This header includes nothing but the standard library. Whatever fails throws glip::Error; nothing is printed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(_WIN32)
#define GLIP_API
#else
#define GLIP_API __attribute__((visibility("default")))
#endif

namespace glip {

/// What a caller can do about an error; the same kinds as the exceptions of the Python package.
enum class ErrorKind {
  option = 1,   ///< pass another value
  prompt = 2,   ///< change the prompt
  frame = 3,    ///< skip or convert this picture
  bundle = 4,   ///< copy the bundle again, or export it again
  backend = 5,  ///< the inference library failed or is too old
  missing = 6,  ///< install or build what the message names
  closed = 7,   ///< open the detector again
  internal = 8  ///< a fault of this library or of the system, such as no memory
};

/// An error; what() is one line: what was wrong, with the value, what is legal, and what to do next.
class GLIP_API Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

/// How a detector is opened.
struct Options {
  std::string backend = "openvino";  ///< or "onnxruntime", or "tensorrt" for engines that glip-build made
  std::string precision = "f32";     ///< openvino: "f32"; "bf16" where the CPU has instructions for it; "auto" for bf16 if so
  int shortest_side = 800;           ///< pixels; frames are resized to it before the network
  int longest_side = 1333;           ///< pixels; the other side's limit, 0 for none
  int threads = 0;                   ///< CPU threads; 0 for one a core
  std::string cache_dir;             ///< for prompts and compiled graphs; empty for the user's, shared with Python
  bool cache = true;                 ///< false keeps prompts in memory only, and compiles graphs each time
  bool verify = true;                ///< check the hashes of all files, some seconds a gigabyte
  std::string engines;               ///< tensorrt: their folder or its name in the bundle; empty for the first that fit
  bool trusted = true;               ///< false refuses native code that comes with the bundle: all of tensorrt
  bool plugins = true;               ///< tensorrt: false takes only engines that need no plugin library
  /// How pictures of the host are resized: "exact", as GLIP was evaluated; or, with tensorrt alone, "gpu": they are uploaded as
  /// they are and resized there, exactly within one gray level. Empty for "gpu" where the backend can, otherwise "exact".
  std::string resize;
};

/// Order of the channels of a picture, 8 bits each.
enum class PixelFormat { bgr = 0, rgb = 1, bgra = 2, rgba = 3, gray = 4, nv12 = 5 };

/// Where a picture is.
enum class Memory { host = 0, cuda = 1 };

/// A picture that belongs to the caller. It is read during the call and not kept. In CUDA memory, which backend tensorrt reads,
/// it is BGR, RGB, BGRA, RGBA or NV12; it is resized there, to one gray level of what the host computes.
struct ImageView {
  const void* data = nullptr;
  int width = 0;          ///< pixels
  int height = 0;         ///< pixels
  std::size_t pitch = 0;  ///< bytes from one row to the next one below; 0 where rows follow without a gap
  PixelFormat format = PixelFormat::bgr;
  const void* chroma = nullptr;  ///< nv12: the plane of U and V; nullptr where it follows the rows of Y
  std::size_t chroma_pitch = 0;  ///< nv12: bytes from one row of it to the next; 0 for pitch
  Memory memory = Memory::host;
  void* stream = nullptr;  ///< CUDA stream that writes the picture, null for the legacy default one; unused for host memory
};

/// One box.
struct Detection {
  float x1, y1, x2, y2;  ///< pixels of the picture
  float score;           ///< in [0, 1]
  int label;             ///< index of the class in the prompt
  std::string phrase;    ///< that class as the prompt names it
};

/// A phrase of a caption: half-open ranges of characters (code points, not bytes), and its label.
struct Phrase {
  std::vector<std::pair<std::size_t, std::size_t>> spans;
  std::string label;  ///< empty for the words of the spans
};

namespace detail {
struct PromptData;
struct DetectorState;
}  // namespace detail

/// An encoded prompt: cheap to copy, and good for every detector of the same bundle, in any thread.
class GLIP_API Prompt {
 public:
  Prompt() = default;  ///< of no use but to be assigned to

  const std::vector<std::string>& phrases() const;  ///< one label per class
  std::size_t chunks() const;                       ///< how many runs of the head it takes: 1, or more for a long list of names
  /// Token ids of a chunk, [CLS] to [SEP]; throws ErrorKind::option where there is no such chunk.
  const std::vector<std::int64_t>& tokens(std::size_t chunk = 0) const;
  explicit operator bool() const noexcept { return data_ != nullptr; }

 private:
  friend class Detector;
  std::shared_ptr<const detail::PromptData> data_;
};

/// An open bundle. Changing the prompt never rebuilds anything. Calls from several threads wait for each other; give each
/// stream of frames a clone.
class GLIP_API Detector {
 public:
  /// Open the folder that glip-export wrote.
  static Detector open(const std::string& path, const Options& options = {});

  /// Another detector that shares the compiled graphs and the known prompts, with buffers of its own.
  Detector clone() const;

  /// Encode class names, as the official evaluation does; the text branch runs only if the prompt is new.
  ///
  /// A list may have any length. One that does not fit into a prompt is divided into chunks, which are cached one by one;
  /// their scores are not calibrated against each other, so that one threshold may suit some better than others.
  /// \param names what to find; a name with [brackets] is scored by what they hold.
  /// \param classes_per_prompt so many names in each chunk (officially 40 for LVIS); 0 fills prompts.
  Prompt encode(const std::vector<std::string>& names, std::size_t classes_per_prompt = 0);
  Prompt encode(std::initializer_list<std::string> names, std::size_t classes_per_prompt = 0) {
    return encode(std::vector<std::string>(names), classes_per_prompt);
  }

  /// Encode a caption: "person. dog" or "a man with a [green hat]". A sentence needs brackets, or phrases.
  Prompt encode(const std::string& caption);

  /// Encode a caption whose phrases are known.
  Prompt encode(const std::string& caption, const std::vector<Phrase>& phrases);

  /// Find what the prompt names: boxes with a score above the threshold, best first; at most as many as the bundle says
  /// (100), and those that tie with the last.
  std::vector<Detection> detect(const ImageView& image, const Prompt& prompt, float threshold = 0.5f);

  /// The same with a threshold for each class.
  std::vector<Detection> detect(const ImageView& image, const Prompt& prompt, const std::vector<float>& thresholds);

  /// Find what the prompt names in several pictures at once; the detections of each. They share a canvas as large as the
  /// largest: GLIP sees the padding, so pictures of unequal shape give slightly other scores together than alone.
  std::vector<std::vector<Detection>> detect(const std::vector<ImageView>& images, const Prompt& prompt,
                                             float threshold = 0.5f);

  /// The same with a threshold for each class.
  std::vector<std::vector<Detection>> detect(const std::vector<ImageView>& images, const Prompt& prompt,
                                             const std::vector<float>& thresholds);

  /// Find what each of several prompts names in one picture, running the backbone once; the detections of each, with
  /// labels that are places in that prompt.
  std::vector<std::vector<Detection>> detect_prompts(const ImageView& image, const std::vector<Prompt>& prompts,
                                                     float threshold = 0.5f);

  /// The same with a threshold for each class of each prompt.
  std::vector<std::vector<Detection>> detect_prompts(const ImageView& image, const std::vector<Prompt>& prompts,
                                                     const std::vector<std::vector<float>>& thresholds);

  /// How pictures of the host are resized: "exact" or "gpu". It is "exact" also where tensorrt was opened with no choice and
  /// finds no NVRTC, which compiles the GPU's resize; Options::resize "gpu" throws there, and says what is missing.
  const char* resize() const;

  /// Free the memory; clones go on. Every later call throws ErrorKind::closed.
  void close() noexcept;

  Detector(Detector&&) noexcept;
  Detector& operator=(Detector&&) noexcept;
  Detector(const Detector&) = delete;
  Detector& operator=(const Detector&) = delete;
  ~Detector();

 private:
  using Found = std::vector<std::vector<std::vector<Detection>>>;  // by prompt and picture
  Found find(const std::vector<ImageView>& images, const std::vector<Prompt>& prompts,
             const std::vector<std::vector<float>>& thresholds);
  explicit Detector(std::unique_ptr<detail::DetectorState> state);
  detail::DetectorState& state() const;
  std::unique_ptr<detail::DetectorState> state_;
};

/// The version of the library, such as "0.2.0".
GLIP_API const char* version() noexcept;

}  // namespace glip
