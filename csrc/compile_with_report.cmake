# Runs COMMAND (a list), writes what the compiler said to REPORT, and stops the build on an error, a register spill, or wgmma
# instructions that ptxas serialised: such a kernel is right, and slow without a word. ONLY_RIGHT: for kernels that are only asked
# whether they are right; spills and serialised products are let through.
execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
file(WRITE ${REPORT} "${said}")
if(failed)
  message(FATAL_ERROR "${said}")
endif()
if(ONLY_RIGHT)
  return()
endif()
if(said MATCHES "Registers are spilled|[1-9][0-9]* bytes spill")
  message(FATAL_ERROR "register spill:\n${said}")
endif()
# At K = 256 the state's 128 accumulators, the product's 32 and the operands in flight are more registers than a thread has.
set(known "chunk_sweep_kernelINS0_11SweepConfigILi256E")
string(REGEX MATCHALL "\\(C75(07|10|11|12|14|15)\\)[^\n]*" serialised "${said}")
foreach(line IN LISTS serialised)
  if(NOT line MATCHES "${known}")
    message(FATAL_ERROR "ptxas serialises wgmma, or ignores setmaxnreg: ${line}\nSee docs/traps.md for what brings this on; known and left: ${known}")
  endif()
endforeach()
