#include "tests/simgpu/errors.h"

#include <cctype>
#include <map>

namespace simgpu {
namespace {

struct Row {
  std::string name;
  std::string text;
};

// "CUDA_ERROR_OUT_OF_MEMORY" becomes "out of memory".
std::string text_of(const std::string& name) {
  constexpr char kPrefix[] = "CUDA_ERROR_";
  std::string text = name.rfind(kPrefix, 0) == 0 ? name.substr(sizeof(kPrefix) - 1) : "no error";
  for (char& c : text) c = c == '_' ? ' ' : static_cast<char>(std::tolower(c));
  return text;
}

const std::map<int, Row>& rows() {
  static const auto* table = new std::map<int, Row>{
#define ROW(name, value) {value, {#name, text_of(#name)}},
#include "tests/simgpu/result_codes.def"
#undef ROW
  };
  return *table;
}

}  // namespace

const char* result_name(int result) {
  auto row = rows().find(result);
  return row == rows().end() ? nullptr : row->second.name.c_str();
}

const char* result_text(int result) {
  auto row = rows().find(result);
  return row == rows().end() ? nullptr : row->second.text.c_str();
}

bool parse_result(const std::string& text, CUresult* result) {
  for (const auto& [value, row] : rows()) {
    if (row.name == text || std::to_string(value) == text) {
      *result = static_cast<CUresult>(value);
      return true;
    }
  }
  return false;
}

}  // namespace simgpu
