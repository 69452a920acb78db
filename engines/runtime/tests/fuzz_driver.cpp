// glip_fuzz FOLDER -runs=N -seed=S: runs the fuzz target, under the name that libFuzzer gives it, on the files of a folder and
// on changed copies of them. The same seed gives the same inputs.

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
// The sanitizers gave it this name.
// NOLINTNEXTLINE(bugprone-reserved-identifier)
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

std::string current;
long run_number = 0;

/// Say which input it was, in hexadecimal.
void report() {
  std::fprintf(stderr, "fuzz: input %ld: ", run_number);
  for (const char c : current) std::fprintf(stderr, "%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
  std::fputc('\n', stderr);
}

void run(const std::string& input) {
  current = input;
  ++run_number;
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
}

class Mutator {
 public:
  Mutator(std::vector<std::string> seeds, std::uint64_t seed) : seeds_(std::move(seeds)), random_(seed) {}

  std::string next() {
    std::string out = pick(seeds_);
    for (std::size_t changes = 1 + below(6); changes > 0; --changes) change(out);
    return out;
  }

 private:
  std::size_t below(std::size_t limit) { return static_cast<std::size_t>(random_() % limit); }
  template <typename List>
  auto pick(const List& list) -> decltype(list[0]) {
    return list[below(std::size(list))];
  }

  void change(std::string& text) {
    static const char* const kPieces[] = {"[",
                                          "]",
                                          "\\[",
                                          ".",
                                          " . ",
                                          "(",
                                          ")",
                                          "_",
                                          "\n",
                                          "\t",
                                          "\"",
                                          "{",
                                          "}",
                                          "-1",
                                          "1e99",
                                          "null",
                                          "true",
                                          "999999999999999999999",
                                          "0",
                                          "[MASK]",
                                          "[SEP]",
                                          "##",
                                          ":",
                                          ",",
                                          "\xcc\x81",
                                          "\xe4\xbd\xa0",
                                          "\xed\xa0\x80",
                                          "\xff",
                                          "\xc4\xb0",
                                          "\xe2\x80\x8b",
                                          "\xf0\x9f\x8d\x8e",
                                          "\xef\xbf\xbd"};
    const std::size_t at = 1 + below(text.size() + 1);  // the first byte is the kind
    const std::size_t from = std::min(at, text.size());
    switch (below(6)) {
      case 0:
        if (from < text.size()) text[from] = static_cast<char>(below(256));
        break;
      case 1:
        text.erase(from, 1 + below(8));
        break;
      case 2:
        text.insert(from, pick(kPieces));
        break;
      case 3: {  // a piece of it again
        const std::string piece = text.substr(1 + below(text.size()), below(40));
        for (std::size_t times = 1 + below(text.size() < 4000 ? 20 : 1); times > 0; --times) text.insert(from, piece);
        break;
      }
      case 4: {  // the end of another
        const std::string& other = pick(seeds_);
        text = text.substr(0, from) + other.substr(std::min(other.size(), 1 + below(other.size() + 1)));
        break;
      }
      default:
        if (from < text.size()) text.resize(from);
        break;
    }
    if (text.empty()) text = std::string(1, static_cast<char>(below(6)));
  }

  std::vector<std::string> seeds_;
  std::mt19937_64 random_;
};

}  // namespace

int main(int count, char** arguments) {
  long runs = 1000;
  std::uint64_t seed = 1;
  std::vector<std::string> files, seeds;
  for (int i = 1; i < count; ++i) {
    if (std::strncmp(arguments[i], "-runs=", 6) == 0) {
      runs = std::atol(arguments[i] + 6);
    } else if (std::strncmp(arguments[i], "-seed=", 6) == 0) {
      seed = std::strtoull(arguments[i] + 6, nullptr, 10);
    } else if (std::filesystem::is_directory(arguments[i])) {
      for (const auto& entry : std::filesystem::directory_iterator(arguments[i])) files.push_back(entry.path().string());
    }
  }
  std::sort(files.begin(), files.end());
  for (const std::string& file : files) {
    std::ifstream stream(file, std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    if (!content.empty()) seeds.push_back(std::move(content));
  }
  if (seeds.empty()) {
    std::fprintf(stderr, "usage: glip_fuzz FOLDER -runs=N -seed=S, with at least one file in the folder\n");
    return 2;
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(report);
  std::signal(SIGABRT, [](int) { report(); });
  for (const std::string& one : seeds) run(one);
  Mutator mutator(seeds, seed);
  while (run_number < runs) run(mutator.next());
  std::printf("%ld inputs\n", run_number);
  return 0;
}
