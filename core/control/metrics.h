// The engine's figures in Prometheus's text format. For the control API.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/stats.h"

namespace dormouse::control {

struct GateFigures {
  bool closed = false;
  std::uint32_t waiting_threads = 0;
};

/// All metrics, each with its HELP and TYPE line; labels are tag, device and backup. The content
/// type is kMetricsContentType.
std::string format_metrics(const std::vector<TagStats>& tags, const Progress& progress,
                           const GateFigures& gate, const std::string& version, double start_time);

inline constexpr char kMetricsContentType[] = "text/plain; version=0.0.4; charset=utf-8";

}  // namespace dormouse::control
