#include <map>

#include "prompt.hpp"
#include "text.hpp"

namespace glip {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::prompt, message); }

bool is_separator(char32_t c) { return std::u32string_view(U".,;|_").find(c) != std::u32string_view::npos; }

/// Whether nothing is left of a text without separators, and spaces of these kinds, at its ends.
bool has_no_words(std::u32string_view text, std::u32string_view spaces) {
  for (const char32_t c : text) {
    if (!is_separator(c) && spaces.find(c) == std::u32string_view::npos) return false;
  }
  return true;
}

Span stripped(std::u32string_view text, std::size_t start, std::size_t end) {
  while (start < end && is_space(text[start])) ++start;
  while (end > start && is_space(text[end - 1])) --end;
  return {start, end};
}

std::u32string words(std::u32string_view text, const std::vector<Span>& spans) {
  std::u32string out;
  for (const auto& [start, end] : spans) {
    if (!out.empty()) out += U' ';
    out += text.substr(start, end - start);
  }
  return single_spaced(out);
}

/// Take the brackets out; the text without them, and where in it their contents are.
std::pair<std::u32string, std::vector<Span>> brackets(std::u32string_view text, const std::string& what) {
  std::u32string plain;
  std::vector<Span> spans;
  std::size_t start = 0, opened = 0;
  bool inside = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto at = [&](std::size_t place) {
      return "at character " + std::to_string(place + 1) + " of " + what + " (" + shown(text) + ")";
    };
    const char32_t c = text[i];
    if (c == U'\\' && i + 1 < text.size() && (text[i + 1] == U'[' || text[i + 1] == U']')) {
      plain += text[++i];
    } else if (c == U'[') {
      if (inside) refuse("'[' " + at(i) + " is inside another bracket; close that first, or write '\\['");
      inside = true;
      start = plain.size();
      opened = i;
    } else if (c == U']') {
      if (!inside) refuse("']' " + at(i) + " closes nothing; add the '[' or write '\\]'");
      const Span span = stripped(plain, start, plain.size());
      if (has_no_words(std::u32string_view(plain).substr(span.first, span.second - span.first), U"")) {
        refuse("the brackets that end " + at(i) + " hold no words; put the phrase between them");
      }
      spans.push_back(span);
      inside = false;
    } else {
      plain += c;
    }
    if (i + 1 == text.size() && inside) {
      refuse("'[' " + at(opened) + " is never closed; add a ']' or write '\\['");
    }
  }
  return {plain, spans};
}

/// The official clean_name, to its single pass over double spaces.
std::u32string cleaned(const std::u32string& name) {
  const std::size_t open = name.find(U'('), close = name.rfind(U')');
  std::u32string without = name;
  if (open != std::u32string::npos && close != std::u32string::npos && open < close) {
    without = name.substr(0, open) + name.substr(close + 1);
  }
  std::u32string out;
  for (std::size_t i = 0; i < without.size(); ++i) {
    const bool space = without[i] == U' ' || without[i] == U'_';
    out += space ? U' ' : without[i];
    if (space && i + 1 < without.size() && (without[i + 1] == U' ' || without[i + 1] == U'_')) ++i;
  }
  return out;
}

/// Ranges of dots after which white space or the end follows.
std::vector<Span> separating_dots(std::u32string_view text) {
  std::vector<Span> out;
  for (std::size_t i = 0; i < text.size();) {
    if (text[i] != U'.') {
      ++i;
      continue;
    }
    std::size_t end = i;
    while (end < text.size() && text[end] == U'.') ++end;
    if (end == text.size() || is_space(text[end])) out.emplace_back(i, end);
    i = end;
  }
  return out;
}

/// Whether a caption is but a name, such as "traffic light" or "a red apple", and no sentence.
bool is_plain_name(std::u32string_view text) {
  static const char32_t* const kFunctionWords[] = {
      U"am",     U"is",      U"are",    U"was",   U"were",  U"be",    U"been",   U"being",  U"has",     U"have",    U"had",
      U"do",     U"does",    U"did",    U"get",   U"gets",  U"got",   U"a",      U"an",     U"the",     U"and",     U"or",
      U"but",    U"of",      U"on",     U"in",    U"at",    U"by",    U"to",     U"from",   U"for",     U"with",    U"without",
      U"into",   U"onto",    U"over",   U"under", U"above", U"below", U"behind", U"beside", U"between", U"near",    U"along",
      U"across", U"through", U"around", U"next",  U"off",   U"up",    U"down",   U"inside", U"outside", U"against", U"while",
      U"as",     U"that",    U"which",  U"who",   U"whose", U"this",  U"these",  U"those",  U"there",   U"here",    U"he",
      U"she",    U"it",      U"they",   U"his",   U"her",   U"its",   U"their",  U"them"};
  std::vector<std::u32string> found;
  for (std::size_t i = 0; i < text.size();) {
    if (is_space(text[i])) {
      ++i;
      continue;
    }
    std::size_t end = i + 1;
    if (is_word(text[i])) {
      const std::u32string_view joints = U"'\u2019./-";
      while (end < text.size() && (is_word(text[end]) || (joints.find(text[end]) != std::u32string_view::npos &&
                                                          end + 1 < text.size() && is_word(text[end + 1])))) {
        ++end;
      }
    } else if (text[i] != U'.') {
      return false;
    } else {
      const std::u32string_view rest = text.substr(i);
      if (!has_no_words(rest, U" \t\r\n") || rest.find_first_of(U",;|_") != std::u32string_view::npos) return false;
      break;
    }
    found.push_back(fold(text.substr(i, end - i)));
    i = end;
  }
  for (std::size_t i = 1; i < found.size(); ++i) {
    for (const char32_t* word : kFunctionWords) {
      if (found[i] == word) return false;
    }
  }
  return true;
}

/// Whether the pieces between dots are the phrases of a caption: a dotted list, a word, or a name.
bool is_list_or_name(std::u32string_view caption, const std::vector<Span>& dots) {
  std::vector<std::u32string_view> pieces;
  std::size_t start = 0;
  for (std::size_t i = 0; i <= dots.size(); ++i) {
    const std::size_t end = i < dots.size() ? dots[i].first : caption.size();
    const std::u32string_view piece = caption.substr(start, end - start);
    if (!has_no_words(piece, U" \t\r\n")) pieces.push_back(piece);
    start = i < dots.size() ? dots[i].second : end;
  }
  if (pieces.size() > 1) return true;
  for (const Span& dot : dots) {
    if (dot.first > 0 && is_space(caption[dot.first - 1])) return true;
  }
  return pieces.empty() || single_spaced(pieces.front()).find(U' ') == std::u32string::npos || is_plain_name(pieces.front());
}

}  // namespace

MarkedCaption mark_names(const std::vector<std::string>& names) {
  if (names.empty()) refuse("the prompt is an empty list; name at least one class, for example {\"person\"}");
  MarkedCaption out;
  std::map<std::u32string, std::size_t> seen;
  for (std::size_t index = 0; index < names.size(); ++index) {
    const std::string what = "class " + std::to_string(index);
    const std::u32string given = decode(names[index]);
    const auto [plain, pieces] = brackets(single_spaced(given), what);
    if (pieces.size() > 1) {
      refuse(what + " (" + shown(given) + ") has " + std::to_string(pieces.size()) + " bracketed parts; one can be the name");
    }
    std::u32string prefix, name = cleaned(plain), suffix, label = plain;
    if (!pieces.empty()) {
      const auto [start, end] = pieces.front();
      prefix = plain.substr(0, start);
      label = name = plain.substr(start, end - start);
      suffix = plain.substr(end);
    }
    if (has_no_words(label, U" ") || has_no_words(name, U" ")) {
      refuse(what + " is empty (" + shown(given) + "); remove it or name it");
    }
    const auto first = seen.emplace(fold(label), index);
    if (!first.second) {
      refuse(what + " (" + shown(label) + ") repeats class " + std::to_string(first.first->second) + "; remove one of them");
    }
    if (index) out.caption += U". ";
    out.caption += prefix;
    out.spans.push_back({{out.caption.size(), out.caption.size() + name.size()}});
    out.caption += name + suffix;
    out.phrases.push_back(label);
  }
  return out;
}

MarkedCaption mark_caption(const std::string& text) {
  const std::u32string given = decode(text);
  bool any = false;
  for (const char32_t c : given) any = any || !(is_space(c) || is_separator(c) || c == U'[' || c == U']');
  if (!any) refuse("the prompt " + shown(given) + " has no words; name what to detect, for example \"person. dog\"");
  auto [caption, bracketed] = brackets(given, "the prompt");
  MarkedCaption out;
  out.caption = caption;
  for (const Span& span : bracketed) {
    out.phrases.push_back(words(caption, {span}));
    out.spans.push_back({span});
  }
  if (!bracketed.empty()) return out;
  const std::vector<Span> dots = separating_dots(caption);
  if (!is_list_or_name(caption, dots)) {
    refuse("the phrases of the sentence " + shown(caption) +
           " are not found by the C++ runtime; put brackets around what to find: 'a man with a [green hat]'");
  }
  std::map<std::u32string, std::u32string> seen;
  std::size_t start = 0;
  for (std::size_t i = 0; i <= dots.size(); ++i) {
    const Span span = stripped(caption, start, i < dots.size() ? dots[i].first : caption.size());
    start = i < dots.size() ? dots[i].second : caption.size();
    const std::u32string label = caption.substr(span.first, span.second - span.first);
    if (has_no_words(label, U"")) continue;
    const auto known = seen.emplace(fold(label), label);
    if (!known.second) {
      refuse("phrase " + shown(label) + " repeats " + shown(known.first->second) + "; remove one of them");
    }
    out.phrases.push_back(single_spaced(label));
    out.spans.push_back({span});
  }
  return out;
}

MarkedCaption mark_spans(const std::string& text, const std::vector<Phrase>& phrases) {
  MarkedCaption out;
  out.caption = decode(text);
  if (has_no_words(out.caption, U" \t\r\n")) {
    refuse("the caption " + shown(out.caption) + " has no words; it must describe the picture");
  }
  if (phrases.empty()) refuse("the caption has no phrases; give the range of characters of each");
  for (std::size_t index = 0; index < phrases.size(); ++index) {
    const Phrase& phrase = phrases[index];
    const std::string what = "phrase " + std::to_string(index) + " of the caption";
    if (phrase.spans.empty()) refuse(what + " has no spans; give the range of characters of each piece");
    std::size_t last = 0;
    for (const auto& [start, end] : phrase.spans) {
      const std::string range = "(" + std::to_string(start) + ", " + std::to_string(end) + ")";
      if (start >= end || end > out.caption.size()) {
        refuse(what + " is " + range + "; legal is 0 <= start < end <= " + std::to_string(out.caption.size()) +
               " (the caption)");
      }
      if (start < last) {
        refuse(what + " has " + range + " after an end of " + std::to_string(last) + "; order its pieces, no overlap");
      }
      last = end;
    }
    out.spans.push_back(phrase.spans);
    out.phrases.push_back(phrase.label.empty() ? words(out.caption, phrase.spans) : decode(phrase.label));
    if (!phrase.label.empty() && single_spaced(out.phrases.back()).empty()) {
      refuse(what + " has the label " + shown(out.phrases.back()) + "; labels have words");
    }
  }
  return out;
}

}  // namespace glip
