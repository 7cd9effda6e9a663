# Runs COMMAND (a list), writes what the compiler said to REPORT, and stops the build on an error, a register spill, or wgmma
# instructions that ptxas made wait for one another: such a kernel is right, and slow without a word. ALLOW_SPILLS: for kernels that are
# only asked whether they are right.
execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
file(WRITE ${REPORT} "${said}")
if(failed)
  message(FATAL_ERROR "${said}")
endif()
if(NOT ALLOW_SPILLS AND said MATCHES "Registers are spilled|[1-9][0-9]* bytes spill")
  message(FATAL_ERROR "register spill:\n${said}")
endif()
