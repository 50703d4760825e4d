-- The body of a request, which nginx has in memory or in a file: read it by offset, replace it by the rebuilt body.
local body = {}
local CHUNK = 65536 -- bytes copied at a time from file to file

-- Open the body of this request: a table with its size and read(offset, count); offsets begin at 0.
function body.open()
    ngx.req.read_body()
    local path = ngx.req.get_body_file()
    local file = path and io.open(path, "rb")
    if file then
        local function read(offset, count)
            file:seek("set", offset)
            return file:read(count) or ""
        end
        return { size = file:seek("end"), path = path, file = file, read = read }
    end
    local data = ngx.req.get_body_data() or ""
    return { size = #data, read = function(offset, count) return data:sub(offset + 1, offset + count) end }
end

function body.close(source)
    if source.file then
        source.file:close()
    end
end

local function copy(source, parts, file)
    for _, part in ipairs(parts) do
        if type(part) == "string" then
            assert(file:write(part))
        else
            local stop = part.offset + part.size
            for offset = part.offset, stop - 1, CHUNK do
                assert(file:write(source.read(offset, math.min(CHUNK, stop - offset))))
            end
        end
    end
    assert(file:close())
end

-- Replace the body. parts: strings, and tables whose `offset` and `size` select a piece of the source.
-- Returns false when a file cannot be written.
function body.replace(source, parts)
    if source.file then
        local path = source.path .. ".rebuilt"
        local file = io.open(path, "wb")
        if not (file and pcall(copy, source, parts, file)) then
            os.remove(path)
            return false
        end
        ngx.req.set_body_file(path, true) -- nginx deletes the file after the request
        return true
    end
    local pieces = {}
    for index, part in ipairs(parts) do
        pieces[index] = type(part) == "string" and part or source.read(part.offset, part.size)
    end
    ngx.req.set_body_data(table.concat(pieces))
    return true
end

return body
