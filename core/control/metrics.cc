// See metrics.h. The names follow Prometheus's conventions: base units, counters end in
// _total.
#include "core/control/metrics.h"

#include <fmt/format.h>

#include <string_view>

namespace dormouse::control {

namespace {

/// A label's value: the format wants \, " and line ends escaped.
std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    if (c == '\\' || c == '"') result += '\\';
    if (c == '\n') {
      result += "\\n";
    } else {
      result += c;
    }
  }
  return result;
}

class Page {
 public:
  void family(std::string_view name, std::string_view type, std::string_view help) {
    name_ = name;
    fmt::format_to(std::back_inserter(text_), "# HELP dormouse_{0} {2}\n# TYPE dormouse_{0} {1}\n",
                   name, type, help);
  }
  template <typename Value>
  void sample(std::string_view labels, Value value) {
    fmt::format_to(std::back_inserter(text_), "dormouse_{}{} {}\n", name_, labels, value);
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
  std::string_view name_;
};

struct TagFamily {
  const char* name;
  const char* type;
  const char* help;
  double (*value)(const TagStats&);
};

#define DORMOUSE_FIGURE(expression) \
  [](const TagStats& tag) -> double { return static_cast<double>(tag.expression); }

constexpr TagFamily kTagFamilies[] = {
    {"allocated_bytes", "gauge", "Bytes in live blocks, as the program asked for them.",
     DORMOUSE_FIGURE(allocated)},
    {"mapped_bytes", "gauge", "Physical device memory held now.", DORMOUSE_FIGURE(mapped)},
    {"asleep_bytes", "gauge", "Physical device memory given back, to be restored on waking.",
     DORMOUSE_FIGURE(asleep)},
    {"backup_host_bytes", "gauge", "Host memory held for backups.", DORMOUSE_FIGURE(backed_up)},
    {"backup_disk_bytes", "gauge", "Disk space held for backups.", DORMOUSE_FIGURE(on_disk)},
    {"allocated_peak_bytes", "gauge", "The most that was allocated at once.",
     DORMOUSE_FIGURE(peak_allocated)},
    {"mapped_peak_bytes", "gauge", "The most physical device memory that was held at once.",
     DORMOUSE_FIGURE(peak_mapped)},
    {"blocks", "gauge", "Live blocks.", DORMOUSE_FIGURE(blocks)},
    {"chunks", "gauge", "Chunks of physical memory, awake and asleep.", DORMOUSE_FIGURE(chunks)},
    {"allocations_total", "counter", "Blocks allocated so far.", DORMOUSE_FIGURE(allocations)},
    {"frees_total", "counter", "Blocks freed so far.", DORMOUSE_FIGURE(frees)},
    {"sleeps_total", "counter", "Times that memory was put to sleep.", DORMOUSE_FIGURE(sleeps)},
    {"wakes_total", "counter", "Times that memory was woken.", DORMOUSE_FIGURE(wakes)},
    {"last_sleep_bytes", "gauge", "Physical memory that the last sleep released.",
     DORMOUSE_FIGURE(last_sleep.bytes)},
    {"last_sleep_copied_bytes", "gauge", "Content that the last sleep copied.",
     DORMOUSE_FIGURE(last_sleep.copied_bytes)},
    {"last_sleep_unchanged_bytes", "gauge", "Content that the last sleep knew to be unchanged.",
     DORMOUSE_FIGURE(last_sleep.unchanged_bytes)},
    {"last_sleep_seconds", "gauge", "Duration of the last sleep.",
     DORMOUSE_FIGURE(last_sleep.seconds)},
    {"last_sleep_timestamp_seconds", "gauge", "Unix time when the last sleep ended; 0 is never.",
     DORMOUSE_FIGURE(last_sleep.unix_time)},
    {"last_wake_bytes", "gauge", "Physical memory that the last wake restored.",
     DORMOUSE_FIGURE(last_wake.bytes)},
    {"last_wake_copied_bytes", "gauge", "Content that the last wake copied.",
     DORMOUSE_FIGURE(last_wake.copied_bytes)},
    {"last_wake_differing_bytes", "gauge",
     "Content that the last wake, when verified, found not to be what fell asleep; 0 is right.",
     DORMOUSE_FIGURE(last_wake.differing_bytes)},
    {"last_wake_seconds", "gauge", "Duration of the last wake.",
     DORMOUSE_FIGURE(last_wake.seconds)},
    {"last_wake_timestamp_seconds", "gauge", "Unix time when the last wake ended; 0 is never.",
     DORMOUSE_FIGURE(last_wake.unix_time)},
};

#undef DORMOUSE_FIGURE

}  // namespace

std::string format_metrics(const std::vector<TagStats>& tags, const Progress& progress,
                           const GateFigures& gate, const std::string& version, double start_time) {
  Page page;
  page.family("build_info", "gauge", "The library's version; always 1.");
  page.sample(fmt::format("{{version=\"{}\"}}", escaped(version)), 1);
  page.family("process_start_time_seconds", "gauge", "Unix time when the process started.");
  page.sample("", start_time);
  for (const TagFamily& family : kTagFamilies) {
    page.family(family.name, family.type, family.help);
    for (const TagStats& tag : tags) {
      page.sample(fmt::format("{{tag=\"{}\",device=\"{}\",backup=\"{}\"}}", escaped(tag.tag),
                              tag.device, backup_name(tag.backup)),
                  family.value(tag));
    }
  }
  page.family("held_bytes", "gauge", "Device memory that stays awake, by who holds it.");
  for (const TagStats& tag : tags) {
    for (const HeldBytes& held : tag.held) {
      page.sample(
          fmt::format("{{tag=\"{}\",device=\"{}\",backup=\"{}\",by=\"{}\"}}", escaped(tag.tag),
                      tag.device, backup_name(tag.backup), holder_name(held.by)),
          held.bytes);
    }
  }
  page.family("gate_closed", "gauge", "1 while calls of the program that touch memory wait.");
  page.sample("", gate.closed ? 1 : 0);
  page.family("gate_waiting_threads", "gauge", "Threads of the program that wait at the gate.");
  page.sample("", gate.waiting_threads);
  page.family("operation_active", "gauge", "1 while a sleep or a wake runs.");
  page.sample("{operation=\"sleep\"}", progress.active && progress.operation == "sleep" ? 1 : 0);
  page.sample("{operation=\"wake\"}", progress.active && progress.operation == "wake" ? 1 : 0);
  page.family("operation_done_bytes", "gauge", "What the running operation has done.");
  page.sample("", progress.active ? progress.done_bytes : 0);
  page.family("operation_total_bytes", "gauge", "What the running operation will have done.");
  page.sample("", progress.active ? progress.total_bytes : 0);
  return page.take();
}

}  // namespace dormouse::control
