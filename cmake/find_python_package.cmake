# find_python_package(NAME RESULT): the folder of an installed Python package, without importing it; empty if there is none.
# An isolated build (pip) runs the Python that pip runs in, with another path: then what that Python has without it counts too, so that
# packages that are too large to install for a build (torch) or that only some builds need (CUTLASS) are found where they are.
function(find_python_package name result)
  set(script "import importlib.util as u; s = u.find_spec('${name}'); print(next(iter(s.submodule_search_locations)) if s else '', end='')")
  foreach(environment "" "--unset=PYTHONPATH;--unset=PYTHONNOUSERSITE")
    execute_process(COMMAND ${CMAKE_COMMAND} -E env ${environment} ${Python_EXECUTABLE} -c "${script}" OUTPUT_VARIABLE folder ERROR_QUIET)
    if(EXISTS "${folder}")
      break()
    endif()
  endforeach()
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()
