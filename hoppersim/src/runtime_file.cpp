// What happened, one JSON line each, in the file that HOPPERSIM_REPORT names: written at once, so that the lines are
// there however the program ends. hoppersim/_run.py reads them.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace hoppersim {

namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    char escape[8];
    if (c == '"' || c == '\\') {
      result += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      result += escape;
    } else {
      result += c;
    }
  }
  return result + '"';
}

// {"event": …, "name": value, …}
class Line {
 public:
  explicit Line(const char* event) : text_("{\"event\": " + quoted(event)) {}
  Line& add(const char* name, const std::string& value) { return raw(name, quoted(value)); }
  Line& add(const char* name, uint64_t value) { return raw(name, std::to_string(value)); }
  Line& add(const char* name, const Dim3& d) {
    return raw(name, "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]");
  }
  void write() {
    static const int file = [] {
      const std::string& path = runtime().report_path;
      const int opened = open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
      if (opened >= 0) return opened;
      std::fprintf(stderr, "hoppersim: cannot write the report HOPPERSIM_REPORT=%s\n", path.c_str());
      std::_Exit(2);
    }();
    text_ += "}\n";
    if (::write(file, text_.data(), text_.size()) != static_cast<ssize_t>(text_.size()))
      std::fprintf(stderr, "hoppersim: the report %s is incomplete\n", runtime().report_path.c_str());
  }

 private:
  Line& raw(const char* name, const std::string& value) {
    text_ += ", " + quoted(name) + ": " + value;
    return *this;
  }
  std::string text_;
};

bool wanted() { return !runtime().report_path.empty(); }

}  // namespace

void tell_module() {
  if (wanted()) Line("module").write();
}

void tell_launch(const LaunchRecord& r, bool finished) {
  if (!wanted()) return;
  Line line("launch");
  line.add("kernel", r.kernel).add("mangled", r.mangled).add("finished", static_cast<uint64_t>(finished));
  line.add("grid", r.grid).add("block", r.block).add("cluster", r.cluster);
  line.add("static_shared", r.static_shared).add("dynamic_shared", r.dynamic_shared);
  line.add("occupancy", static_cast<uint64_t>(r.occupancy)).add("registers", static_cast<uint64_t>(r.registers));
  for (const auto& [name, value] : r.counters.numbers()) line.add(name, value);
  line.write();
}

void tell_refusal(const std::string& kernel, const std::string& error) {
  if (wanted()) Line("refusal").add("kernel", kernel).add("error", error).write();
}

void tell(const Report& report) {
  if (!wanted()) return;
  Line line("finding");
  line.add("kind", report.kind).add("severity", report.severity == Severity::error ? "error" : "warning");
  line.add("kernel", report.kernel).add("source", report.source);
  line.add("ptx_line", static_cast<uint64_t>(report.line)).add("instruction", report.instruction);
  line.add("text", report.text).add("count", report.count);
  line.write();
}

}  // namespace hoppersim
