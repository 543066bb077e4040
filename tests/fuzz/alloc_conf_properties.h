// What must hold for every text in every dialect of PyTorch's allocator configuration.
#pragma once

#include <string>

#include "config/alloc_conf.h"
#include "tests/fuzz/target.h"

namespace dormouse::fuzz {

inline void check_alloc_conf(const config::AllocDialect& dialect, const std::string& text) {
  using namespace dormouse::config;
  AllocSettings before;
  const bool taken = !apply_alloc_conf(dialect, text, before).has_value();
  const auto conf = AllocConf::read(dialect.generation, text);
  require(conf.ok() != !conf.error().empty(), "a failure has a message and a success has none");
  if (!taken) return;
  require(conf.ok(), "what PyTorch takes can be read");

  AllocSettings printed;
  require(!apply_alloc_conf(dialect, conf->print(), printed), "what is printed is taken");
  require(printed == before, "what is printed means the same");

  AllocConf edited = *conf;
  edited.set("expandable_segments", "False");
  before.expandable_segments = false;
  AllocSettings after;
  require(!apply_alloc_conf(dialect, edited.print(), after), "what is edited is taken");
  require(after == before, "only the edited key changes");
  require(edited.get("expandable_segments") == "False", "the edited key has its value");
  edited.remove("expandable_segments");
  require(!edited.get("expandable_segments"), "a removed key is gone");
}

}  // namespace dormouse::fuzz
