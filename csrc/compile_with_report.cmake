# Runs COMMAND (a list), writes what the compiler said to REPORT, and stops the build on an error or a register spill.
execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
file(WRITE ${REPORT} "${said}")
if(failed)
  message(FATAL_ERROR "${said}")
endif()
if(said MATCHES "Registers are spilled|[1-9][0-9]* bytes spill")
  message(FATAL_ERROR "register spill:\n${said}")
endif()
