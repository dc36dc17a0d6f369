// mergecore._stream as Python sees it: windows over files (stream/windows.h), and what the writer
// needs of the kernel: early write-back, and whether the page cache may be left out. Knows bytes,
// pages and faults; knows nothing of tensors or safetensors.
#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "stream/windows.h"

namespace {

// ---- write-back ---------------------------------------------------------------------------------

void sync_range(int fd, int64_t offset, int64_t nbytes, unsigned flags) {
  py::gil_scoped_release release;
  if (sync_file_range(fd, offset, nbytes, flags) == 0) return;
  if (errno == ENOSYS || errno == EINVAL || errno == ESPIPE) return;  // cannot, or need not
  throw os_error("write-back of " + std::to_string(nbytes) + " bytes at offset " +
                 std::to_string(offset) + " failed");
}

// The multiple that offsets in the file, lengths and addresses must have for O_DIRECT; 0 where the
// file system does not say that it has it (Linux 6.1).
int64_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
  struct statx status = {};
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0 && status.stx_dio_offset_align != 0) {
    return std::max(status.stx_dio_offset_align, status.stx_dio_mem_align);
  }
#else
  static_cast<void>(fd);
#endif
  return 0;
}

// ---- Python -------------------------------------------------------------------------------------

std::string file_path(const py::object& path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

PyObject* read_fault = nullptr;  // the exception type

void set_read_fault(const Fault& fault) {
  py::str text = py::str("{}: {} (reading at byte {})")
                     .format(python_path(fault.path), py::str(fault.reason), fault.offset);
  py::object error = py::handle(read_fault)(text);
  error.attr("path") = python_path(fault.path);
  error.attr("offset") = fault.offset;
  error.attr("reason") = fault.reason;
  PyErr_SetObject(read_fault, error.ptr());
}

void set_os_error(const OsError& error) {
  py::object path = error.path.empty() ? py::object(py::none()) : python_path(error.path);
  py::tuple arguments = py::make_tuple(error.code, error.message, path);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

}  // namespace

PYBIND11_MODULE(_stream, module) {
  module.doc() = "Windows over files in a known order, read ahead; early write-back.";

  read_fault = PyErr_NewExceptionWithDoc(
      "mergecore._stream.ReadFault",
      "A file could not be read to its end: truncated or modified while in use, or an I/O error.",
      PyExc_OSError, nullptr);
  if (read_fault == nullptr) throw py::error_already_set();
  module.add_object("ReadFault", py::reinterpret_borrow<py::object>(read_fault));
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Fault& fault) {
      set_read_fault(fault);
    } catch (const OsError& error) {
      set_os_error(error);
    }
  });

  py::class_<View>(module, "_View", py::buffer_protocol()).def_buffer([](View& view) {
    static uint8_t nothing;
    return py::buffer_info(view.nbytes > 0 ? view.data : &nothing, 1,
                           py::format_descriptor<uint8_t>::format(), 1,
                           {static_cast<py::ssize_t>(view.nbytes)}, {1}, false);
  });

  py::class_<WindowStream>(module, "WindowStream",
                           "Windows over files in a known order, read ahead by a thread.")
      .def(py::init([](const std::vector<py::object>& files, const std::string& mode, int64_t depth,
                       int64_t threads, py::object opener) {
             std::vector<std::string> paths;
             for (const py::object& file : files) paths.push_back(file_path(file));
             return std::make_unique<WindowStream>(std::move(paths), mode, depth, threads,
                                                   std::move(opener));
           }),
           py::arg("files"), py::arg("mode") = "map", py::arg("depth") = 1, py::kw_only(),
           py::arg("threads") = 1, py::arg("opener") = py::none())
      .def("submit", &WindowStream::submit, py::arg("pieces"), py::arg("keep") = false)
      .def("next",
           [](WindowStream& stream) {
             py::list views;
             for (View& view : stream.next()) {
               views.append(py::memoryview(py::cast(std::move(view))));
             }
             return views;
           })
      .def("skip", &WindowStream::skip)
      .def("check", &WindowStream::check)
      .def("close",
           [](WindowStream& stream) {
             py::gil_scoped_release release;
             stream.close();
           })
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](WindowStream& stream, const py::args&) {
        py::gil_scoped_release release;
        stream.close();
      });

  module.def(
      "start_writeback",
      [](int fd, int64_t offset, int64_t nbytes) {
        sync_range(fd, offset, nbytes, SYNC_FILE_RANGE_WRITE);
      },
      py::arg("fd"), py::arg("offset"), py::arg("nbytes"));
  module.def("direct_alignment", &direct_alignment, py::arg("fd"));
  module.def(
      "wait_writeback",
      [](int fd, int64_t offset, int64_t nbytes) {
        sync_range(
            fd, offset, nbytes,
            SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
      },
      py::arg("fd"), py::arg("offset"), py::arg("nbytes"));
}
