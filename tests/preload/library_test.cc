// What libdormouse.so is to the dynamic loader: what it needs, which C library it needs, what it
// exports. Read from the file itself. And its tables of functions beside the toolkit's headers.
#include <cuda.h>
#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/preload/process.h"

namespace {

struct Symbol {
  std::string name;
  unsigned char binding;
  unsigned char type;
  bool defined;
  unsigned version;  // its index in the library's version tables; 0 and 1 are none
};

// A 64-bit shared library in memory.
class Library {
 public:
  explicit Library(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    if (bytes_.size() < sizeof(Elf64_Ehdr)) throw std::runtime_error("cannot read " + path);
    const auto& header = at<Elf64_Ehdr>(0);
    for (unsigned i = 0; i < header.e_shnum; ++i) {
      sections_.push_back(at<Elf64_Shdr>(header.e_shoff + i * header.e_shentsize));
    }
  }

  std::vector<std::string> needed() const {
    std::vector<std::string> names;
    const Elf64_Shdr& dynamic = section(SHT_DYNAMIC);
    for (std::size_t i = 0; i < dynamic.sh_size / sizeof(Elf64_Dyn); ++i) {
      const auto& entry = at<Elf64_Dyn>(dynamic.sh_offset + i * sizeof(Elf64_Dyn));
      if (entry.d_tag == DT_NEEDED) names.push_back(text(dynamic.sh_link, entry.d_un.d_val));
    }
    return names;
  }

  std::set<std::string> needed_versions() const {
    std::set<std::string> versions;
    const Elf64_Shdr& needs = section(SHT_GNU_verneed);
    std::size_t offset = needs.sh_offset;
    for (unsigned i = 0; i < needs.sh_info; ++i) {
      const auto& need = at<Elf64_Verneed>(offset);
      std::size_t aux = offset + need.vn_aux;
      for (unsigned j = 0; j < need.vn_cnt; ++j) {
        const auto& entry = at<Elf64_Vernaux>(aux);
        versions.insert(text(needs.sh_link, entry.vna_name));
        aux += entry.vna_next;
      }
      offset += need.vn_next;
    }
    return versions;
  }

  std::vector<Symbol> symbols() const {
    std::vector<Symbol> result;
    const Elf64_Shdr& table = section(SHT_DYNSYM);
    const Elf64_Shdr& versions = section(SHT_GNU_versym);
    for (std::size_t i = 1; i < table.sh_size / sizeof(Elf64_Sym); ++i) {
      const auto& symbol = at<Elf64_Sym>(table.sh_offset + i * sizeof(Elf64_Sym));
      result.push_back({text(table.sh_link, symbol.st_name),
                        static_cast<unsigned char>(ELF64_ST_BIND(symbol.st_info)),
                        static_cast<unsigned char>(ELF64_ST_TYPE(symbol.st_info)),
                        symbol.st_shndx != SHN_UNDEF,
                        at<Elf64_Half>(versions.sh_offset + i * sizeof(Elf64_Half)) & 0x7fffu});
    }
    return result;
  }

  // The symbol that each relocation of a thread-local variable refers to; "" for none.
  std::vector<Symbol> thread_local_references() const {
    const std::vector<Symbol> all = symbols();
    std::vector<Symbol> result;
    for (const Elf64_Shdr& section : sections_) {
      if (section.sh_type != SHT_RELA) continue;
      for (std::size_t i = 0; i < section.sh_size / sizeof(Elf64_Rela); ++i) {
        const auto& entry = at<Elf64_Rela>(section.sh_offset + i * sizeof(Elf64_Rela));
        const auto type = ELF64_R_TYPE(entry.r_info);
        const auto index = ELF64_R_SYM(entry.r_info);
        if (is_thread_local(type) && index != 0) result.push_back(all[index - 1]);
      }
    }
    return result;
  }

 private:
  static bool is_thread_local(std::size_t type) {
#if defined(__x86_64__)
    return type == R_X86_64_TPOFF64 || type == R_X86_64_DTPMOD64 || type == R_X86_64_DTPOFF64;
#else
    return type == R_AARCH64_TLS_TPREL || type == R_AARCH64_TLS_DTPMOD ||
           type == R_AARCH64_TLS_DTPREL || type == R_AARCH64_TLSDESC;
#endif
  }

  template <typename T>
  const T& at(std::size_t offset) const {
    if (offset + sizeof(T) > bytes_.size()) throw std::runtime_error("the file is cut off");
    return *reinterpret_cast<const T*>(bytes_.data() + offset);
  }
  std::string text(std::size_t section, std::size_t offset) const {
    return bytes_.data() + sections_.at(section).sh_offset + offset;
  }
  const Elf64_Shdr& section(unsigned type) const {
    for (const Elf64_Shdr& section : sections_) {
      if (section.sh_type == type) return section;
    }
    throw std::runtime_error("no section of type " + std::to_string(type));
  }

  std::vector<char> bytes_;
  std::vector<Elf64_Shdr> sections_;
};

const Library& library() {
  static const Library instance(preload::library());
  return instance;
}

std::set<std::string> lines_of(const std::string& path) {
  std::ifstream file(preload::built(path));
  EXPECT_TRUE(file.good()) << path;
  std::set<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != '#') lines.insert(line);
  }
  return lines;
}

std::set<std::string> hook_names() {
  return {
#define HOOK(name, ret, params, args, group) #name,
#include "shim/hooks/hooks.def"
  };
}

// Those of left.def.
std::set<std::string> left_names() {
  std::set<std::string> names;
#define LEAVE(reason, ...)                            \
  for (std::stringstream list(#__VA_ARGS__); list;) { \
    std::string name;                                 \
    std::getline(list >> std::ws, name, ',');         \
    if (!name.empty()) names.insert(name);            \
  }
#include "shim/hooks/left.def"
  return names;
}

std::string without_variant(const std::string& name) {
  const std::size_t at = name.size() < 5 ? 0 : name.size() - 5;
  const std::string end = name.substr(at);
  return end == "_ptsz" || end == "_ptds" ? name.substr(0, at) : name;
}

// The functions that a header of the toolkit declares, per-thread variants and versions included.
// What `#define cuMemFree cuMemFree_v2` makes of a declaration is in the define.
std::set<std::string> declared_in(const std::string& header) {
  std::ifstream file(preload::built("../cuda/include/" + header));
  EXPECT_TRUE(file.good()) << header;
  static const std::regex declaration(
      R"((?:CUDAAPI|CUDARTAPI|CUDARTAPI_CDECL)\s+(cu\w+)\s*\(|^\s*#define\s+cu\w+\s+(cu\w+_v\d+)\s*$|_API_PTSZ\((cu\w+)\)|_API_PTDS\((cu\w+)\))");
  std::set<std::string> names;
  for (std::string line; std::getline(file, line);) {
    if (line.find("cu") == std::string::npos || line.find(" *") == 0) continue;
    std::smatch match;
    if (!std::regex_search(line, match, declaration)) continue;
    for (std::size_t i = 1; i < match.size(); ++i) {
      if (match[i].matched) names.insert(match[i]);
    }
  }
  return names;
}

bool starts_with(const std::string& text, const char* prefix) {
  return text.rfind(prefix, 0) == 0;
}

// A new toolkit's functions are hooked, or left with a reason, before it is built with.
TEST(Tables, HaveEveryFunctionOfTheHeaders) {
  const std::set<std::string> hooked = hook_names();
  const std::set<std::string> left = left_names();
  for (const auto& [header, at_least] :
       {std::pair<const char*, std::size_t>{"cuda.h", 450}, {"cuda_runtime_api.h", 250}}) {
    const std::set<std::string> declared = declared_in(header);
    EXPECT_GT(declared.size(), at_least) << header;
    for (const std::string& name : declared) {
      EXPECT_TRUE(hooked.count(name) == 1 || left.count(without_variant(name)) == 1)
          << name << " of " << header << " is neither in hooks.def nor in left.def";
    }
  }
}

TEST(Tables, HaveAFunctionOnce) {
  const std::set<std::string> left = left_names();
  ASSERT_GT(left.size(), 700u);
  for (const std::string& name : hook_names()) {
    EXPECT_EQ(left.count(without_variant(name)), 0u) << name << " is in hooks.def and in left.def";
  }
}

TEST(Library, NeedsTheCLibraryAlone) {
  for (const std::string& name : library().needed()) {
    EXPECT_TRUE(name == "libc.so.6" || name == "libm.so.6" || starts_with(name, "ld-linux"))
        << name;
  }
}

TEST(Library, NeedsNoNewerCLibraryThan2_34) {
  ASSERT_FALSE(library().needed_versions().empty());
  for (const std::string& version : library().needed_versions()) {
    if (version == "GLIBC_ABI_DT_RELR") ADD_FAILURE() << version;
    if (!starts_with(version, "GLIBC_2.")) continue;
    EXPECT_LE(std::stoi(version.substr(std::strlen("GLIBC_2."))), 34) << version;
  }
}

TEST(Library, ExportsEachHook) {
  std::set<std::string> missing = hook_names();
  ASSERT_GT(missing.size(), 150u);
  for (const Symbol& symbol : library().symbols()) {
    if (symbol.defined && symbol.type == STT_FUNC && symbol.binding == STB_GLOBAL) {
      missing.erase(symbol.name);
    }
  }
  EXPECT_TRUE(missing.empty()) << *missing.begin();
}

TEST(Library, ExportsNothingElse) {
  std::set<std::string> allowed = hook_names();
  allowed.merge(lines_of("shim/exports_torch.txt"));
  allowed.insert({"dlsym", "pthread_setname_np", "set_memory_margin_bytes",
                  "InitializeInjectionNvtx2", "InitializeInjectionNvtxExtension"});
  for (const Symbol& symbol : library().symbols()) {
    if (!symbol.defined || symbol.binding == STB_LOCAL) continue;
    EXPECT_TRUE(allowed.count(symbol.name) == 1 || starts_with(symbol.name, "dormouse_") ||
                starts_with(symbol.name, "tms_"))
        << symbol.name;
    EXPECT_NE(symbol.binding, STB_WEAK) << symbol.name;
    EXPECT_NE(symbol.binding, STB_GNU_UNIQUE) << symbol.name;
  }
}

// A version of its own would make the loader pass the definition over where a program asks for
// cudaMalloc@libcudart.so.13.
TEST(Library, GivesItsSymbolsNoVersion) {
  for (const Symbol& symbol : library().symbols()) {
    if (!symbol.defined) continue;
    EXPECT_LE(symbol.version, 1u) << symbol.name;
  }
}

// A linker once gave a thread-local variable the place of another by referring to a symbol that is
// not there.
TEST(Library, RefersToThreadLocalVariablesThatAreThere) {
  for (const Symbol& symbol : library().thread_local_references()) {
    EXPECT_TRUE(symbol.defined && symbol.type == STT_TLS) << "'" << symbol.name << "'";
  }
}

}  // namespace
