# Collects the licences of what the web page may hold: every package that npm fetched to build it, each text once.
#
#   cmake -DPACKAGES=node_modules -DOUT=LICENSES.web-page -P page_licences.cmake
#
# Without packages (no npm, or no network: then there is no page) no file is written.

cmake_minimum_required(VERSION 3.21)
file(GLOB found LIST_DIRECTORIES false
    ${PACKAGES}/*/[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]* ${PACKAGES}/@*/*/[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*)
if(found)
    set(texts)
    file(WRITE ${OUT} "")
    foreach(path ${found})
        get_filename_component(directory ${path} DIRECTORY)
        file(RELATIVE_PATH name ${PACKAGES} ${directory})
        file(SHA256 ${path} digest)
        list(FIND texts ${digest} at)
        if(at EQUAL -1)
            list(APPEND texts ${digest})
            list(LENGTH texts at)
            file(READ ${path} text)
            file(APPEND ${OUT} "=== ${name} (text ${at}) ===\n${text}\n")
        else()
            math(EXPR at "${at} + 1")
            file(APPEND ${OUT} "=== ${name}: text ${at} ===\n")
        endif()
    endforeach()
endif()
