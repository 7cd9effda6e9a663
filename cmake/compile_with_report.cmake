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
if(said MATCHES "\\(C75(07|10|11|12|14|15|17)\\)[^\n]*")
  message(FATAL_ERROR "ptxas serialises wgmma or ignores setmaxnreg: ${CMAKE_MATCH_0}\ndocs/traps.md says what brings this on")
endif()
