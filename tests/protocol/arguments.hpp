// Arguments of the form name=value.
#pragma once

#include <map>
#include <string>

namespace protocol {

class Arguments {
 public:
  Arguments(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t equals = argument.find('=');
      values_[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
  }
  unsigned long long number(const std::string& name) const { return std::stoull(values_.at(name)); }
  const std::string& text(const std::string& name) const { return values_.at(name); }

 private:
  std::map<std::string, std::string> values_;
};

}  // namespace protocol
