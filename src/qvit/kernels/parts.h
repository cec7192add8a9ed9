// The operations of a program, from what is handed over to what the plan is made of.
#pragma once

#include "part.h"
#include "plan.h"

namespace qvit {

// Add the operation that `part` is to a plan.
void add_operation(Plan& plan, const Part& part);

}  // namespace qvit
